"""The layers around every route, driven as ASGI applications with a clock that the test turns."""

from collections.abc import Iterable
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from structlog.testing import capture_logs

from penstock.http.middleware import BodyLimit, HTTPMetrics, RequestMiddleware


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def perf_counter(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    turned = Clock()
    monkeypatch.setattr("penstock.http.middleware.time", turned)
    return turned


def layered(app: ASGIApp, registry: CollectorRegistry | None = None) -> RequestMiddleware:
    return RequestMiddleware(BodyLimit(app, max_body_bytes=10), HTTPMetrics(registry or CollectorRegistry()))


async def call(
    app: ASGIApp, pieces: Iterable[bytes | None] = (b"",), headers: dict[str, str] | None = None, method: str = "POST"
) -> list[Message]:
    """Send a request whose body comes in ``pieces``, None for a client that leaves; return what was sent back."""
    scope: Scope = {
        "type": "http",
        "method": method,
        "path": "/",
        "headers": [(name.encode(), value.encode()) for name, value in (headers or {}).items()],
    }
    parts = list(pieces)
    messages: list[Message] = [
        {"type": "http.disconnect"}
        if piece is None
        else {"type": "http.request", "body": piece, "more_body": i < len(parts) - 1}
        for i, piece in enumerate(parts)
    ]
    sent: list[Message] = []

    async def receive() -> Message:
        return messages.pop(0)

    async def send(message: Message) -> None:
        sent.append(message)

    await app(scope, receive, send)
    return sent


def headers_of(sent: list[Message]) -> dict[str, str]:
    return {name.decode(): value.decode() for name, value in sent[0]["headers"]}


async def answer(scope: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"ok"})


async def test_overhead_is_what_neither_client_nor_engine_took(clock: Clock) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        clock.now_s += 0.002
        with scope["state"]["waited"].waiting():
            clock.now_s += 7.0
        clock.now_s += 0.0015
        await answer(scope, receive, send)

    assert headers_of(await call(layered(app)))["x-penstock-overhead-ms"] == "3.500"


async def test_a_slow_upload_is_not_overhead(clock: Clock) -> None:
    async def dawdle(scope: Scope, receive: Receive, send: Send) -> None:
        async def slowly() -> Message:
            clock.now_s += 5.0
            return await receive()

        await layered(answer)(scope, slowly, send)

    assert headers_of(await call(dawdle, [b"a", b"b"]))["x-penstock-overhead-ms"] == "0.000"


@pytest.mark.parametrize(
    ("sent", "trace_id"),
    [
        ("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", "4bf92f3577b34da6a3ce929d0e0e4736"),
        ("00-00000000000000000000000000000000-00f067aa0ba902b7-01", None),
        ("00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01", None),
        ("00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01", None),
        ("nonsense", None),
        ("", None),
    ],
)
async def test_a_sound_trace_is_in_the_summary(sent: str, trace_id: str | None) -> None:
    with capture_logs() as logs:
        await call(layered(answer), headers={"traceparent": sent})
    assert logs[0].get("trace_id") == trace_id


@pytest.mark.parametrize("offered", ["", "a" * 129, "two words", "line\nbreak", "é"])
async def test_ids_that_could_hurt_a_log_or_header_are_replaced(offered: str) -> None:
    given = headers_of(await call(layered(answer), headers={"x-request-id": offered}))["x-request-id"]
    assert given != offered
    assert given.isalnum()


@pytest.mark.parametrize("pieces", [[b"12345", b"67890", b"1"], [b"12345678901"]])
async def test_a_body_without_declared_length_is_cut_off_where_the_limit_is(pieces: list[bytes]) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        raise AssertionError("was called")

    assert (await call(layered(app), pieces))[0]["status"] == 413


async def test_a_declared_length_is_refused_before_anything_is_read() -> None:
    sent = await call(BodyLimitAlone(), [], headers={"content-length": "11"})
    assert sent[0]["status"] == 413


class BodyLimitAlone:
    """The limit with nothing behind it that could be reached."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def unreachable(scope: Scope, receive: Receive, send: Send) -> None:
            raise AssertionError("was called")

        await layered(unreachable)(scope, receive, send)


async def test_a_body_at_the_limit_arrives_whole() -> None:
    seen: list[Any] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(await receive())
        await answer(scope, receive, send)

    await call(layered(app), [b"12345", b"67890"])
    assert seen == [{"type": "http.request", "body": b"1234567890", "more_body": False}]


async def test_a_client_that_leaves_while_sending_counts_as_499() -> None:
    registry = CollectorRegistry()
    with capture_logs() as logs:
        assert await call(layered(answer, registry), [b"123", None]) == []
    assert logs[0]["status"] == 499
    labels = {"route": "unmatched", "method": "POST", "code": "499"}
    assert registry.get_sample_value("penstock_http_requests_total", labels) == 1
    assert registry.get_sample_value("penstock_http_requests_in_flight") == 0


async def test_a_fault_inside_is_counted_and_passed_on() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        raise ValueError("inside")

    registry = CollectorRegistry()
    with capture_logs() as logs, pytest.raises(ValueError, match="inside"):
        await call(layered(app, registry))
    assert logs[0]["status"] == 500
    assert registry.get_sample_value("penstock_http_requests_in_flight") == 0
