"""The client speaks to any OpenAI-compatible server and turns every fault into one of our errors."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer, unused_port

from penstock.errors import InvalidRequest, ModelNotFound, Overloaded, PenstockError, UnavailableError
from penstock.http.client import OpenAIClient, api_root

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@asynccontextmanager
async def client_of(handler: Handler, api_key: str | None = None) -> AsyncIterator[OpenAIClient]:
    app = web.Application()
    app.router.add_route("*", "/v1/{path:.*}", handler)
    async with TestServer(app) as server, OpenAIClient(str(server.make_url("/")), api_key=api_key) as client:
        yield client


def answering(status: int, body: str) -> Handler:
    async def handle(request: web.Request) -> web.Response:
        return web.Response(status=status, text=body)

    return handle


def streaming(*lines: str) -> Handler:
    async def handle(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        for line in lines:
            await response.write(f"{line}\n".encode())
        return response

    return handle


@pytest.mark.parametrize(
    ("url", "root"),
    [
        ("http://localhost:8000", "http://localhost:8000/v1"),
        ("http://localhost:8000/", "http://localhost:8000/v1"),
        ("https://api.example.org/openai/v1/", "https://api.example.org/openai/v1"),
    ],
)
def test_a_url_without_a_path_means_v1(url: str, root: str) -> None:
    assert api_root(url) == root


async def test_models_are_listed_with_the_key() -> None:
    seen: list[str | None] = []

    async def handle(request: web.Request) -> web.Response:
        seen.append(request.headers.get("authorization"))
        return web.json_response({"data": [{"id": "one"}, {"id": "two"}]})

    async with client_of(handle, api_key="sk-1") as client:
        assert await client.model_names() == ["one", "two"]
    assert seen == ["Bearer sk-1"]


async def test_events_end_with_done() -> None:
    handler = streaming(": ping", 'data: {"a": 1}', "", "event: x", 'data:{"a": 2}', "data: [DONE]", 'data: {"a": 3}')
    async with client_of(handler) as client:
        assert [event async for event in client.stream("/completions", {})] == [{"a": 1}, {"a": 2}]


async def test_a_stream_cut_short_is_an_error() -> None:
    async with client_of(streaming('data: {"a": 1}')) as client:
        with pytest.raises(UnavailableError, match="before it was done"):
            _ = [event async for event in client.stream("/completions", {})]


async def test_an_error_in_the_stream_keeps_its_kind() -> None:
    line = 'data: {"error": {"code": "overloaded", "message": "the queue is full", "param": null}}'
    async with client_of(streaming(line)) as client:
        with pytest.raises(Overloaded, match="the queue is full"):
            _ = [event async for event in client.stream("/completions", {})]


@pytest.mark.parametrize(
    ("status", "body", "kind", "says"),
    [
        (404, '{"error": {"code": "model_not_found", "message": "no model x"}}', ModelNotFound, "no model x"),
        (400, '{"error": {"code": null, "message": "bad n", "param": "n"}}', InvalidRequest, "bad n"),
        (429, '{"error": {"code": "rate_limit_exceeded", "message": "slow down"}}', Overloaded, "slow down"),
        (502, "<html>bad gateway</html>", UnavailableError, "502"),
        (500, '"a string"', UnavailableError, "500"),
    ],
)
async def test_a_refusal_becomes_the_nearest_error(
    status: int, body: str, kind: type[PenstockError], says: str
) -> None:
    async with client_of(answering(status, body)) as client:
        with pytest.raises(kind, match=says):
            _ = [event async for event in client.stream("/chat/completions", {})]
        with pytest.raises(kind, match=says):
            await client.model_names()


async def test_no_server_is_said_plainly() -> None:
    async with OpenAIClient(f"http://127.0.0.1:{unused_port()}") as client:
        with pytest.raises(UnavailableError, match="penstock serve"):
            await client.model_names()
