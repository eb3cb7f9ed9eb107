"""OpenAI's responses."""

import uuid

from fastapi import FastAPI, Request
from starlette.responses import Response

from penstock.server.api import API
from penstock.server.prepare import check_model
from penstock.server.replies import ERRORS
from penstock.server.responses.form import ResponseForm
from penstock.server.responses.schemas import ResponsesRequest
from penstock.server.responses.translate import PLACES, chat_of, head
from penstock.server.translation import said_as
from penstock.server.turn import Turn


def add_responses(app: FastAPI, api: API) -> None:
    """Add the route."""

    @app.post("/v1/responses", responses=ERRORS)
    async def responses(body: ResponsesRequest, request: Request) -> Response:
        """Answer input items; nothing is kept."""
        model = check_model(body.model, api.names)
        answer_id = f"resp_{uuid.uuid4().hex}"
        with said_as(PLACES):
            chat = chat_of(body)
            conversation = await api.conversation(chat)
            requests = await api.requests(request, answer_id, chat, [conversation.token_ids], conversation)
        begun = head(body, requests[0].sampling, answer_id=answer_id, model=model)
        form = ResponseForm(begun, api.tokenizer, conversation.sights, conversation.reading.call_id)
        turn = Turn(form, conversation.reading, request.state.summary, wants_timeline=body.penstock.timeline)
        return await api.respond(request, requests, turn, stream=bool(body.stream))
