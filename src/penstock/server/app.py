"""The application: its routes, what surrounds them, and its errors."""

from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from prometheus_client import CollectorRegistry
from starlette.exceptions import HTTPException
from starlette.responses import Response

import penstock
from penstock.errors import InvalidRequest, PenstockError
from penstock.http import errors as http_errors
from penstock.http.middleware import BodyLimit, HTTPMetrics, RequestMiddleware
from penstock.protocol import EngineClient
from penstock.server.api import API
from penstock.server.complaints import explain
from penstock.server.config import ServerConfig
from penstock.server.replies import json_response
from penstock.server.routes.adapters import add_adapters
from penstock.server.routes.embedding import add_embedding
from penstock.server.routes.generation import add_generation
from penstock.server.routes.health import add_health
from penstock.server.routes.messages import add_messages
from penstock.server.routes.ranking import add_ranking
from penstock.server.routes.responses import add_responses
from penstock.server.routes.tokenizing import add_tokenizing
from penstock.text import Tokenizer
from penstock.text.chat_template import ChatTemplate

if TYPE_CHECKING:
    from penstock.images.reader import ImageReader


def create_app(
    *,
    client: EngineClient,
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    config: ServerConfig,
    registry: CollectorRegistry,
    images: "ImageReader | None" = None,
) -> FastAPI:
    """Return the server as an ASGI application. Whoever runs it starts, drains and stops ``client``.

    ``registry`` is what /metrics shows; HTTP's own metrics are added to it. ``images`` reads
    what a model that sees is shown.
    """
    app = FastAPI(title="Penstock", version=penstock.__version__, description="OpenAI-compatible API over one model.")
    api = API(client, tokenizer, template, config, images)
    add_generation(app, api)
    add_responses(app, api)
    add_messages(app, api)
    add_embedding(app, api)
    add_ranking(app, api)
    add_adapters(app, api)
    add_tokenizing(app, api)
    add_health(app, client, registry)
    _add_error_handlers(app)
    most = config.max_body_bytes if images is None else max(config.max_body_bytes, images.config.max_body_bytes)
    app.add_middleware(BodyLimit, max_body_bytes=most, max_bodies_bytes=config.max_bodies_bytes)
    app.add_middleware(RequestMiddleware, metrics=HTTPMetrics(registry))
    _describe_as_it_is(app)
    return app


def _describe_as_it_is(app: FastAPI) -> None:
    """Take from /openapi.json the 422 that FastAPI adds to every route with a body: here that is a 400.

    It is made for the first who asks: that takes a third of a second, which every start would wait for.
    """
    make = app.openapi

    def describe() -> dict[str, Any]:
        if app.openapi_schema is None:
            for path in make()["paths"].values():  # the app keeps it
                for operation in path.values():
                    operation["responses"].pop("422", None)
        return make()

    app.openapi = describe  # type: ignore[method-assign]


def _add_error_handlers(app: FastAPI) -> None:
    async def on_penstock_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, PenstockError), "registered for this class"
        request.state.summary["error"] = error.code
        body = http_errors.error_body_at(request.url.path, error)
        return json_response(body, http_errors.status_of(error), http_errors.error_headers(error))

    async def on_validation_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError), "registered for this class"
        return await on_penstock_error(request, explain(error.errors(), error.body))

    async def on_http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException), "registered for this class"
        if error.status_code == 400:
            return await on_penstock_error(request, InvalidRequest("the body is not valid JSON"))
        message = {
            404: f"there is nothing at {request.method} {request.url.path}; see /docs for what there is",
            405: f"{request.url.path} does not take {request.method}",
        }.get(error.status_code, error.detail)
        if http_errors.is_anthropics(request.url.path):
            body = http_errors.anthropic_body(message, error.status_code)
        else:
            code = "not_found" if error.status_code == 404 else None
            body = http_errors.body(message, kind="invalid_request_error", code=code)
        return json_response(body, error.status_code, dict(error.headers or {}))

    app.add_exception_handler(PenstockError, on_penstock_error)
    app.add_exception_handler(RequestValidationError, on_validation_error)
    app.add_exception_handler(HTTPException, on_http_error)
