"""The API: routes, and what surrounds them."""

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from prometheus_client import CollectorRegistry, generate_latest
from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse, Response

import penstock
from penstock.errors import InvalidRequest, PenstockError
from penstock.http import errors as http_errors
from penstock.http.middleware import BodyLimit, HTTPMetrics, RequestMiddleware, Waited
from penstock.http.sse import ClientLeft, EventStream, until_client_leaves
from penstock.protocol import EngineClient, EngineState, GenerateRequest, TokenDelta
from penstock.server.adapters import add_adapters
from penstock.server.answers import Answer, Deltas, ShownPrompts
from penstock.server.complaints import explain
from penstock.server.config import ServerConfig
from penstock.server.prepare import bad_word_tokens, check_model, generate_request, truncated
from penstock.server.reading import Reading
from penstock.server.schemas import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    ErrorResponse,
    TokenizeChatRequest,
    TokenizeRequest,
)
from penstock.server.structure import GrammarChecker, structure_of
from penstock.server.tools import Conventions, ToolUse, answers_to, reading_of, tool_use
from penstock.text import ChatTemplate, Tokenizer

T = TypeVar("T")

_LONG_TEXT_CHARS = 4096
"""Longer text is rendered and tokenized on a thread, so that others' streams do not wait for it."""
_MESSAGE_CHARS = 32
"""What a message costs a template, in characters of text, however short it is."""

_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorResponse, "description": description}
    for status, description in {
        400: "The request is wrong; `param` names where.",
        404: "No such model.",
        413: "The request is too large.",
        500: "The engine failed under this request.",
        503: "Not ready, full or shutting down; `Retry-After` says when to try again.",
        504: "The deadline cannot be met.",
    }.items()
}


def create_app(
    *,
    client: EngineClient,
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    config: ServerConfig,
    registry: CollectorRegistry,
) -> FastAPI:
    """Return the server as an ASGI application. Whoever runs it starts, drains and stops ``client``.

    ``registry`` is what /metrics shows; HTTP's own metrics are added to it.
    """
    app = FastAPI(title="Penstock", version=penstock.__version__, description="OpenAI-compatible API over one model.")
    api = _API(client, tokenizer, template, config)
    _add_generation(app, api)
    add_adapters(app, client, lambda: api.base_names, _ERRORS)
    _add_tokenizing(app, api)
    _add_health(app, client, registry)
    _add_error_handlers(app)
    app.add_middleware(BodyLimit, max_body_bytes=config.max_body_bytes)
    app.add_middleware(RequestMiddleware, metrics=HTTPMetrics(registry))
    _describe_as_it_is(app)
    return app


def _describe_as_it_is(app: FastAPI) -> None:
    """Take from /openapi.json the 422 that FastAPI adds to every route with a body: here that is a 400."""
    for path in app.openapi()["paths"].values():  # made once and kept by the app
        for operation in path.values():
            operation["responses"].pop("422", None)


@dataclass(frozen=True, slots=True)
class _Conversation:
    """A conversation as the model reads it."""

    token_ids: list[int]
    use: ToolUse | None
    reading: Reading


class _API:
    """What the generating routes share."""

    def __init__(
        self, client: EngineClient, tokenizer: Tokenizer, template: ChatTemplate | None, config: ServerConfig
    ) -> None:
        self.client = client
        self.tokenizer = tokenizer
        self.config = config
        self._template = template
        self._conventions = Conventions.of(template, config)
        self._grammars = GrammarChecker(tokenizer, client.model, config)

    @property
    def base_names(self) -> tuple[str, ...]:
        return self.config.served_names or (self.client.model().name,)

    @property
    def names(self) -> tuple[str, ...]:
        return (*self.base_names, *self.client.adapters())

    async def conversation(self, body: ChatCompletionRequest | TokenizeChatRequest) -> _Conversation:
        """Return a conversation's tokens and what is to be expected of the answer."""
        template = self._template
        if template is None:
            raise InvalidRequest("this model has no chat template; use /v1/completions", param="messages")
        use = tool_use(body, self._conventions)
        messages = [message.as_template_input(place) for place, message in enumerate(body.messages)]

        def run() -> _Conversation:
            text = template.render(
                messages,
                add_generation_prompt=body.add_generation_prompt and not body.continue_final_message,
                continue_final_message=body.continue_final_message,
                tools=None if use is None else use.shown,
                variables=body.chat_template_kwargs,
            )
            token_ids = self.tokenizer.encode(text, add_special_tokens=body.add_special_tokens)
            return _Conversation(token_ids, use, reading_of(use, self._conventions, text))

        return await _off_loop(run, sum(len(message["content"]) + _MESSAGE_CHARS for message in messages))

    async def text_tokens(self, texts: list[str], *, add_special_tokens: bool) -> list[list[int]]:
        """Return each text's tokens."""
        return await _off_loop(
            lambda: [self.tokenizer.encode(text, add_special_tokens=add_special_tokens) for text in texts],
            sum(map(len, texts)),
        )

    async def prompts(self, body: CompletionRequest) -> list[list[int]]:
        """Return the token ids of each prompt."""
        given = body.prompt
        if isinstance(given, str):
            texts = [given]
        elif not given:
            raise InvalidRequest("prompt is empty: give at least one", param="prompt")
        elif isinstance(given[0], int):
            return [[token_id for token_id in given if isinstance(token_id, int)]]
        else:
            if len(given) > self.config.max_prompts:
                raise InvalidRequest(
                    f"there are {len(given)} prompts; this server takes at most {self.config.max_prompts} at once",
                    param="prompt",
                )
            if isinstance(given[0], list):
                return [ids for ids in given if isinstance(ids, list)]
            texts = [text for text in given if isinstance(text, str)]
        return await self.text_tokens(texts, add_special_tokens=body.add_special_tokens)

    async def _shown(self, body: CompletionRequest | ChatCompletionRequest, prompts: list[list[int]]) -> ShownPrompts:
        """Return what the answers show of their prompts."""
        if isinstance(body, ChatCompletionRequest):
            return ShownPrompts(token_ids=prompts)
        most = body.prompt_logprobs
        if not body.echo:
            return ShownPrompts(token_ids=prompts, num_alternatives=most)
        if isinstance(body.prompt, str) and body.truncate_prompt_tokens is None:
            echoes = [body.prompt]
        else:
            echoes = await _off_loop(
                lambda: [self.tokenizer.decode(ids, skip_special_tokens=body.skip_special_tokens) for ids in prompts],
                sum(map(len, prompts)),
            )
        return ShownPrompts(token_ids=prompts, echoes=echoes, num_alternatives=most, hides_output=body.max_tokens == 0)

    async def answer(
        self,
        request: Request,
        body: CompletionRequest | ChatCompletionRequest,
        prompts: list[list[int]],
        conversation: _Conversation | None = None,
    ) -> Response:
        """Run every prompt, or the one of a ``conversation``, and return the response, whole or streamed."""
        is_chat = isinstance(body, ChatCompletionRequest)
        model = self.client.model()
        answer_id = f"{'chatcmpl' if is_chat else 'cmpl'}-{uuid.uuid4().hex}"
        summary = request.state.summary
        summary.update(answer_id=answer_id, num_prompts=len(prompts), tenant=body.penstock.tenant)
        if body.stream_options is not None and not body.stream:
            raise InvalidRequest("stream_options needs stream to be true", param="stream_options")
        structure = structure_of(body)
        reading = None
        if conversation is not None:
            reading = conversation.reading
            structure = answers_to(structure, conversation.use, reading, self.tokenizer)
        grammar = None if structure is None else await self._grammars.check(structure)
        bad_words = bad_word_tokens(body.bad_words, self.tokenizer)
        prompts = [truncated(body, ids, model.max_model_tokens) for ids in prompts]
        requests = [
            generate_request(
                body,
                ids,
                request_id=f"{answer_id}-{i}",
                model=model,
                config=self.config,
                adapter=body.model if body.model in self.client.adapters() else None,
                grammar=grammar,
                keeps_special_tokens=reading is not None and reading.needs_special_tokens(self.tokenizer),
                bad_words=bad_words,
            )
            for i, ids in enumerate(prompts)
        ]
        answer = Answer(
            is_chat=is_chat,
            answer_id=answer_id,
            model=check_model(body.model, self.names),
            num_choices=body.num_choices,
            tokenizer=self.tokenizer,
            wants_timeline=body.penstock.timeline,
            reading=reading,
            prompts=await self._shown(body, prompts),
            summary=summary,
        )
        deltas = _measured(_merge(self.client, requests), request.state.waited)
        if not body.stream:
            async with contextlib.aclosing(deltas):
                result = await until_client_leaves(request, answer.whole(deltas))
            return json_response(result)
        # The first delta comes before the status does, so that a refusal is not a 200.
        first = await until_client_leaves(request, _first(deltas))
        include_usage = body.stream_options is not None and body.stream_options.include_usage
        return EventStream(answer.stream(_from_first(first, deltas), include_usage=include_usage))


def _add_generation(app: FastAPI, api: _API) -> None:
    @app.get("/v1/models", responses={503: _ERRORS[503]})
    async def models() -> Response:
        """List what is served."""
        return json_response({"object": "list", "data": [_model_card(api, name) for name in api.names]})

    @app.get("/v1/models/{name:path}", responses={404: _ERRORS[404], 503: _ERRORS[503]})
    async def model(name: str) -> Response:
        """Describe one model."""
        return json_response(_model_card(api, check_model(name, api.names)))

    @app.post("/v1/completions", responses=_ERRORS)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continue text."""
        check_model(body.model, api.names)
        return await api.answer(request, body, await api.prompts(body))

    @app.post("/v1/chat/completions", responses=_ERRORS)
    async def chat_completions(body: ChatCompletionRequest, request: Request) -> Response:
        """Answer a conversation."""
        check_model(body.model, api.names)
        conversation = await api.conversation(body)
        return await api.answer(request, body, [conversation.token_ids], conversation)


def _add_tokenizing(app: FastAPI, api: _API) -> None:
    @app.post("/tokenize", responses=_ERRORS)
    async def tokenize(body: TokenizeRequest) -> Response:
        """Return the tokens of a prompt or a conversation."""
        check_model(body.model, api.names)
        if isinstance(body, TokenizeChatRequest):
            tokens = (await api.conversation(body)).token_ids
        else:
            tokens = (await api.text_tokens([body.prompt], add_special_tokens=body.add_special_tokens))[0]
        strings = None
        if body.return_token_strs:
            strings = await _off_loop(lambda: [api.tokenizer.token_text(token_id) for token_id in tokens], len(tokens))
        return json_response(
            {
                "count": len(tokens),
                "max_model_len": api.client.model().max_model_tokens,
                "tokens": tokens,
                "token_strs": strings,
            }
        )

    @app.post("/detokenize", responses=_ERRORS)
    async def detokenize(body: DetokenizeRequest) -> Response:
        """Return the text of tokens."""
        check_model(body.model, api.names)
        vocab_size = api.client.model().vocab_size
        if max(body.tokens, default=0) >= vocab_size:
            raise InvalidRequest(
                f"token id {max(body.tokens)} is not in the vocabulary: ids go from 0 to {vocab_size - 1}",
                param="tokens",
            )
        text = await _off_loop(lambda: api.tokenizer.decode(body.tokens), len(body.tokens))
        return json_response({"prompt": text})


def _add_health(app: FastAPI, client: EngineClient, registry: CollectorRegistry) -> None:
    async def live() -> Response:
        """Say that the process answers; depends on nothing."""
        return json_response({"status": "alive"})

    async def ready() -> Response:
        """Say whether requests are taken now, and if not why."""
        status = client.status()
        is_ready = status.state is EngineState.READY
        headers = {} if is_ready else {"retry-after": "1"}
        return json_response({"status": status.state, "reason": status.reason}, 200 if is_ready else 503, headers)

    async def health() -> Response:
        """Return everything the engine says about itself."""
        status = client.status()
        is_ready = status.state is EngineState.READY
        return json_response(status, 200 if is_ready else 503, {} if is_ready else {"retry-after": "1"})

    async def metrics() -> Response:
        """Return Prometheus metrics."""
        return PlainTextResponse(generate_latest(registry), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def version() -> Response:
        """Return the server's version."""
        return json_response({"version": penstock.__version__})

    unready: dict[int | str, dict[str, Any]] = {503: {"description": "Not ready; the body says why."}}
    for path in ("/health/live", "/ping", "/healthz"):
        app.get(path, include_in_schema=path.startswith("/health/"))(live)
    for path in ("/health/ready", "/readyz"):
        app.get(path, include_in_schema=path.startswith("/health/"), responses=unready)(ready)
    app.get("/health", responses=unready)(health)
    app.get("/metrics", response_class=PlainTextResponse)(metrics)
    app.get("/version")(version)


def _add_error_handlers(app: FastAPI) -> None:
    async def on_penstock_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, PenstockError), "registered for this class"
        request.state.summary["error"] = error.code
        return json_response(
            http_errors.error_body(error), http_errors.status_of(error), http_errors.error_headers(error)
        )

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
        body = http_errors.body(
            message, kind="invalid_request_error", code="not_found" if error.status_code == 404 else None
        )
        return json_response(body, error.status_code, dict(error.headers or {}))

    app.add_exception_handler(PenstockError, on_penstock_error)
    app.add_exception_handler(RequestValidationError, on_validation_error)
    app.add_exception_handler(HTTPException, on_http_error)


def _model_card(api: _API, name: str) -> dict[str, Any]:
    info = api.client.model()
    return {
        "id": name,
        "object": "model",
        "created": _STARTED_UNIX_S,
        "owned_by": "penstock",
        "root": info.name,
        "max_model_len": info.max_model_tokens,
    }


_STARTED_UNIX_S = int(time.time())


def json_response(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Return ``content``, plain data or protocol structs, as JSON."""
    return Response(msgspec.json.encode(content), status, headers, media_type="application/json")


async def _off_loop(work: Callable[[], T], num_chars: int) -> T:
    return await asyncio.to_thread(work) if num_chars > _LONG_TEXT_CHARS else work()


async def _measured(deltas: Deltas, waited: Waited) -> AsyncGenerator[tuple[int, TokenDelta], None]:
    """Yield ``deltas``, counting the time until each."""
    async with contextlib.aclosing(deltas):
        while True:
            try:
                with waited.waiting():
                    item = await anext(deltas)
            except StopAsyncIteration:
                return
            yield item


async def _first(deltas: Deltas) -> tuple[int, TokenDelta]:
    return await anext(deltas)


async def _from_first(first: tuple[int, TokenDelta], rest: Deltas) -> AsyncGenerator[tuple[int, TokenDelta], None]:
    try:
        yield first
        async for item in rest:
            yield item
    finally:
        await rest.aclose()


async def _merge(client: EngineClient, requests: list[GenerateRequest]) -> AsyncGenerator[tuple[int, TokenDelta], None]:
    """Yield the deltas of all requests as they come; closing it, or one request's failure, ends them all."""
    if len(requests) == 1:
        async with contextlib.aclosing(client.generate(requests[0])) as deltas:
            async for delta in deltas:
                yield 0, delta
        return
    queue: asyncio.Queue[tuple[int, TokenDelta | Exception | None]] = asyncio.Queue()

    async def pump(prompt: int, request: GenerateRequest) -> None:
        try:
            async with contextlib.aclosing(client.generate(request)) as deltas:
                async for delta in deltas:
                    queue.put_nowait((prompt, delta))
            queue.put_nowait((prompt, None))
        except Exception as error:  # whoever reads the queue raises it; nothing else would ever come
            queue.put_nowait((prompt, error))

    tasks = [asyncio.create_task(pump(i, request)) for i, request in enumerate(requests)]
    num_left = len(tasks)
    try:
        while num_left:
            prompt, item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                num_left -= 1
            else:
                yield prompt, item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


__all__ = ["ClientLeft", "create_app"]
