"""OpenAI's models, completions and chat completions."""

import time
from typing import Any

from fastapi import FastAPI, Request
from starlette.responses import Response

from penstock.server.api import API
from penstock.server.prepare import check_model
from penstock.server.replies import ERRORS, json_response
from penstock.server.schemas import ChatCompletionRequest, CompletionRequest

_STARTED_UNIX_S = int(time.time())


def add_generation(app: FastAPI, api: API) -> None:
    """Add the routes."""

    @app.get("/v1/models", responses={503: ERRORS[503]})
    async def models() -> Response:
        """List what is served."""
        return json_response({"object": "list", "data": [_model_card(api, name) for name in api.names]})

    @app.get("/v1/models/{name:path}", responses={404: ERRORS[404], 503: ERRORS[503]})
    async def model(name: str) -> Response:
        """Describe one model."""
        return json_response(_model_card(api, check_model(name, api.names)))

    @app.post("/v1/completions", responses=ERRORS)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continue text."""
        check_model(body.model, api.names)
        prompts = await api.prompts(
            body.prompt, param="prompt", most=api.config.max_prompts, add_special_tokens=body.add_special_tokens
        )
        return await api.answer(request, body, prompts)

    @app.post("/v1/chat/completions", responses=ERRORS)
    async def chat_completions(body: ChatCompletionRequest, request: Request) -> Response:
        """Answer a conversation."""
        check_model(body.model, api.names)
        conversation = await api.conversation(body)
        return await api.answer(request, body, [conversation.token_ids], conversation)


def _model_card(api: API, name: str) -> dict[str, Any]:
    info = api.client.model()
    return {
        "id": name,
        "object": "model",
        "created": _STARTED_UNIX_S,
        "owned_by": "penstock",
        "root": info.name,
        "max_model_len": info.max_model_tokens,
    }
