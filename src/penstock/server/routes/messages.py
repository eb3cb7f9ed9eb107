"""Anthropic's messages."""

import uuid
from typing import Any

from fastapi import FastAPI, Request
from starlette.responses import Response

from penstock.server.api import API
from penstock.server.messages.form import MessageForm
from penstock.server.messages.schemas import CountTokensRequest, MessagesError, MessagesRequest
from penstock.server.messages.translate import PLACES, chat_of
from penstock.server.prepare import check_model
from penstock.server.replies import ERRORS, json_response
from penstock.server.translation import said_as
from penstock.server.turn import Turn

_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {**description, "model": MessagesError} for status, description in ERRORS.items()
}


def add_messages(app: FastAPI, api: API) -> None:
    """Add the routes."""

    @app.post("/v1/messages", responses=_ERRORS)
    async def messages(body: MessagesRequest, request: Request) -> Response:
        """Answer a conversation, as Anthropic's API does."""
        model = check_model(body.model, api.names)
        answer_id = f"msg_{uuid.uuid4().hex}"
        with said_as(PLACES):
            chat = chat_of(body)
            conversation = await api.conversation(chat)
            requests = await api.requests(request, answer_id, chat, [conversation.token_ids], conversation)
        form = MessageForm(
            answer_id=answer_id,
            model=model,
            num_prompt_tokens=len(requests[0].prompt_token_ids),
            sights=conversation.sights,
            call_id=conversation.reading.call_id,
        )
        turn = Turn(form, conversation.reading, request.state.summary, wants_timeline=body.penstock.timeline)
        return await api.respond(request, requests, turn, stream=bool(body.stream))

    @app.post("/v1/messages/count_tokens", responses=_ERRORS)
    async def count_tokens(body: CountTokensRequest) -> Response:
        """Return how many tokens a conversation is."""
        check_model(body.model, api.names)
        with said_as(PLACES):
            conversation = await api.conversation(chat_of(body))
        return json_response({"input_tokens": len(conversation.token_ids)})
