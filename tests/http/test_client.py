"""The client speaks to any OpenAI-compatible server and turns every fault into one of our errors."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer, unused_port
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from penstock.errors import (
    ContextTooLong,
    Draining,
    InvalidRequest,
    ModelNotFound,
    Overloaded,
    PenstockError,
    UnavailableError,
)
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


def sending(*pieces: bytes, breaks_off: bool = False) -> Handler:
    """A stream whose pieces leave one by one."""

    async def handle(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        for piece in pieces:
            await response.write(piece)
            await asyncio.sleep(0.001)
        if breaks_off:
            assert request.transport is not None
            request.transport.abort()
        return response

    return handle


def streaming(*lines: str) -> Handler:
    return sending("".join(f"{line}\n" for line in lines).encode())


async def events_of(handler: Handler) -> list[dict[str, Any]]:
    async with client_of(handler) as client:
        return [event async for event in client.stream("/completions", {})]


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


@pytest.mark.parametrize(
    "body",
    ["", "{", "[]", "3", "null", '{"data": null}', '{"data": [3]}', '{"data": [{}]}', '{"data": 5}', "[" * 100_000],
)
async def test_a_list_of_models_that_is_none_is_said_plainly(body: str) -> None:
    async with client_of(answering(200, body)) as client:
        with pytest.raises(UnavailableError, match="does not speak OpenAI's API"):
            await client.model_names()


async def test_a_server_without_models_has_no_default() -> None:
    async with client_of(answering(200, '{"data": []}')) as client:
        with pytest.raises(UnavailableError, match="lists no models"):
            await client.first_model_name()


async def test_events_end_with_done() -> None:
    handler = streaming(
        ": ping",
        "",
        'data: {"a": 1}',
        "",
        "event: x",
        'data:{"a":',
        "data: 2}",
        "",
        "data: [DONE]",
        "",
        'data: {"a": 3}',
        "",
    )
    assert await events_of(handler) == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize("size", [1, 2, 7])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
async def test_events_come_whole_however_they_were_cut(size: int, end: str) -> None:
    text = "é👍\u2028\x85x"
    stream = f'data: {{"text": "{text}"}}{end}{end}data: [DONE]{end}{end}'.encode()
    pieces = [stream[start : start + size] for start in range(0, len(stream), size)]
    assert await events_of(sending(*pieces)) == [{"text": text}]


async def test_several_events_in_one_piece_are_several() -> None:
    assert await events_of(sending(b'data: {"a": 1}\n\ndata: {"a": 2}\n\ndata: [DO', b"NE]\n\n")) == [
        {"a": 1},
        {"a": 2},
    ]


async def test_the_last_line_may_lack_its_end() -> None:
    assert await events_of(sending(b'data: {"a": 1}\n\ndata: [DONE]')) == [{"a": 1}]


async def test_an_event_of_a_megabyte_is_read() -> None:
    (event,) = await events_of(streaming(f'data: {{"text": "{"x" * 1_500_000}"}}', "", "data: [DONE]", ""))
    assert len(event["text"]) == 1_500_000


@pytest.mark.parametrize("pieces", [(b'data: {"a": 1}\n\n',), (b'data: {"a": 1}\n\ndata: {"a"',)])
@pytest.mark.parametrize("breaks_off", [False, True])
async def test_a_stream_cut_short_is_an_error_after_what_came(pieces: tuple[bytes, ...], breaks_off: bool) -> None:
    async with client_of(sending(*pieces, breaks_off=breaks_off)) as client:
        events = client.stream("/completions", {})
        assert await anext(events) == {"a": 1}
        with pytest.raises(UnavailableError, match="before it was done"):
            await anext(events)


@pytest.mark.parametrize("name", ["", "event: error"])
async def test_an_error_in_the_stream_keeps_its_kind(name: str) -> None:
    line = 'data: {"error": {"code": "overloaded", "message": "the queue is full", "param": null}}'
    with pytest.raises(Overloaded, match=r"^the queue is full$"):
        await events_of(streaming('data: {"a": 1, "error": null}', "", name, line, ""))


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        (['data: {"error": {"code": "their_own", "message": "it went wrong"}}'], "broke off its answer: it went wrong"),
        (['data: {"error": "in words"}'], "in words"),
        (["event: error", 'data: {"message": "no object"}'], "no object"),
        (["data: 3"], "an event that holds int"),
        (['data: ["error"]'], "an event that holds list"),
        (["data: {nope"], "does not speak OpenAI's API"),
        (["data: " + "[" * 100_000], "too deeply"),
    ],
)
async def test_events_that_are_none_end_the_stream_with_an_error(lines: list[str], says: str) -> None:
    with pytest.raises(UnavailableError, match=says):
        await events_of(streaming(*lines, ""))


async def test_leaving_a_stream_early_disconnects() -> None:
    left = asyncio.Event()

    async def handle(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        try:
            while True:
                await response.write(b'data: {"a": 1}\n\n')
                await asyncio.sleep(0.001)
        finally:
            left.set()

    async with client_of(handle) as client:
        events = client.stream("/completions", {})
        assert await anext(events) == {"a": 1}
        await events.aclose()
        await asyncio.wait_for(left.wait(), 5)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.binary(max_size=60) | st.text(alphabet='data: {}[]"error,:1\n', max_size=60).map(str.encode),
    st.sampled_from([200, 200, 400, 404, 429, 500]),
)
def test_nothing_a_server_says_is_anything_but_events_or_one_of_our_errors(body: bytes, status: int) -> None:
    async def handle(request: web.Request) -> web.Response:
        return web.Response(status=status, body=body)

    async def talk() -> None:
        async with client_of(handle) as client:
            with contextlib.suppress(PenstockError):
                _ = [event async for event in client.stream("/completions", {})]
            with contextlib.suppress(PenstockError):
                await client.model_names()

    asyncio.run(talk())


@pytest.mark.parametrize(
    ("status", "body", "kind", "says"),
    [
        (404, '{"error": {"code": "model_not_found", "message": "no model x"}}', ModelNotFound, "no model x"),
        (400, '{"error": {"code": null, "message": "bad n", "param": "n"}}', InvalidRequest, "bad n"),
        (429, '{"error": {"code": "rate_limit_exceeded", "message": "slow down"}}', Overloaded, "slow down"),
        (400, '{"error": {"code": "context_length_exceeded", "message": "too long"}}', ContextTooLong, "^too long$"),
        (400, '{"error": {"code": 7, "message": ["odd"], "param": 3}}', InvalidRequest, "odd"),
        (503, '{"error": {"code": "draining", "message": "going"}}', Draining, "^going$"),
        (502, "<html>bad gateway</html>", UnavailableError, "502"),
        (502, "", UnavailableError, "no message"),
        (500, "[" * 100_000, UnavailableError, "500"),
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


@pytest.mark.parametrize(
    ("header", "seconds"),
    [("7", 7.0), ("0.5", 0.5), ("Wed, 21 Oct 2026 07:28:00 GMT", None), ("-1", None), ("nan", None)],
)
async def test_when_to_come_back_is_kept(header: str, seconds: float | None) -> None:
    async def handle(request: web.Request) -> web.Response:
        return web.Response(status=503, text="{}", headers={"retry-after": header})

    async with client_of(handle) as client:
        with pytest.raises(UnavailableError) as caught:
            await client.model_names()
    assert caught.value.retry_after_s == seconds


@pytest.mark.parametrize("url", ["http://127.0.0.1:{port}", "http://", "http://[::1", "ftp://127.0.0.1", "http://a..b"])
async def test_no_server_is_said_plainly(url: str) -> None:
    async with OpenAIClient(url.format(port=unused_port())) as client:
        with pytest.raises(UnavailableError, match="penstock serve"):
            await client.model_names()
        with pytest.raises(UnavailableError, match="penstock serve"):
            await anext(client.stream("/completions", {}))
