"""The layers around every route, driven as ASGI applications with a clock that the test turns."""

import asyncio
import json
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


def layered(app: ASGIApp, registry: CollectorRegistry | None = None, max_bodies_bytes: int = 100) -> RequestMiddleware:
    limited = BodyLimit(app, max_body_bytes=10, max_bodies_bytes=max_bodies_bytes)
    return RequestMiddleware(limited, HTTPMetrics(registry or CollectorRegistry()))


async def call(
    app: ASGIApp, pieces: Iterable[bytes | None] = (b"",), headers: dict[str, str] | None = None, method: str = "POST"
) -> list[Message]:
    """Send a request whose body comes in ``pieces``, None for a client that leaves; return what was sent back."""
    scope: Scope = {
        "type": "http",
        "method": method,
        "path": "/",
        "headers": [(name.encode(), value.encode("latin-1")) for name, value in (headers or {}).items()],
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
        return messages.pop(0) if messages else {"type": "http.disconnect"}

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


async def test_overhead_is_never_negative(clock: Clock) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        scope["state"]["waited"].seconds = 1e-9
        await answer(scope, receive, send)

    assert headers_of(await call(layered(app)))["x-penstock-overhead-ms"] == "0.000"


async def test_a_trace_is_in_the_summary_and_given_back_with_a_span_of_its_own() -> None:
    with capture_logs() as logs:
        sent = await call(
            layered(answer), headers={"traceparent": "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"}
        )
    version, trace_id, span_id, flags = headers_of(sent)["traceparent"].split("-")
    assert (version, trace_id, flags) == ("00", "4bf92f3577b34da6a3ce929d0e0e4736", "01")
    assert (logs[0]["trace_id"], logs[0]["span_id"]) == (trace_id, span_id)
    assert span_id != "00f067aa0ba902b7"


@pytest.mark.parametrize("sent", ["nonsense", "", "00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01"])
async def test_a_broken_trace_is_no_error_and_leaves_nothing_behind(sent: str) -> None:
    with capture_logs() as logs:
        answered = await call(layered(answer), headers={"traceparent": sent})
    assert answered[0]["status"] == 200
    assert "traceparent" not in headers_of(answered)
    assert not {"trace_id", "span_id"} & logs[0].keys()


@pytest.mark.parametrize("offered", ["a", "a" * 128, "req_1.2:3-4"])
async def test_a_sane_id_is_echoed_and_logged(offered: str) -> None:
    with capture_logs() as logs:
        sent = await call(layered(answer), headers={"x-request-id": offered})
    assert headers_of(sent)["x-request-id"] == logs[0]["request_id"] == offered


@pytest.mark.parametrize(
    "offered", ["", "a" * 129, "two words", "line\nbreak", "a\n", "a\r\nset-cookie: x", "é", "a\0"]
)
async def test_ids_that_could_hurt_a_log_or_header_are_replaced(offered: str) -> None:
    given = headers_of(await call(layered(answer), headers={"x-request-id": offered}))["x-request-id"]
    assert given != offered
    assert given.isalnum()


@pytest.mark.parametrize("pieces", [[b"12345", b"67890", b"1"], [b"12345678901"]])
async def test_a_body_without_declared_length_is_cut_off_where_the_limit_is(pieces: list[bytes]) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        raise AssertionError("was called")

    assert (await call(layered(app), pieces))[0]["status"] == 413


@pytest.mark.parametrize("declared", ["11", "9" * 5000])
async def test_a_declared_length_is_refused_before_anything_is_read(declared: str) -> None:
    with capture_logs() as logs:
        sent = await call(layered(unreachable), [], headers={"content-length": declared})
    assert sent[0]["status"] == logs[0]["status"] == 413
    assert logs[0]["error"] == "request_too_large"
    # What was not read would be taken for the next request.
    assert headers_of(sent)["connection"] == "close"
    assert json.loads(sent[1]["body"])["error"]["code"] == "request_too_large"
    assert len(sent[1]["body"]) == int(headers_of(sent)["content-length"])


@pytest.mark.parametrize("declared", ["", "\u00b2", "-5", "1e3", "ten"])
async def test_a_length_that_is_no_number_is_counted_instead(declared: str) -> None:
    assert (await call(layered(answer), [b"1"], headers={"content-length": declared}))[0]["status"] == 200
    assert (await call(layered(answer), [b"1" * 11], headers={"content-length": declared}))[0]["status"] == 413


async def test_a_refused_client_may_finish_sending_but_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penstock.http.middleware._LINGER_S", 0.05)
    num_taken = 0

    async def receive() -> Message:
        nonlocal num_taken
        num_taken += 1
        if num_taken == 20:
            await asyncio.Event().wait()
        return {"type": "http.request", "body": b"x", "more_body": True}

    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    await layered(unreachable)({"type": "http", "method": "POST", "path": "/", "headers": []}, receive, send)
    assert num_taken == 20
    # The whole answer leaves before the rest of the body is read, and its end, which closes the connection, after.
    assert [message.get("more_body") for message in sent] == [None, True, None]
    assert json.loads(sent[1]["body"])["error"]["code"] == "request_too_large"


async def test_bodies_in_flight_are_bounded_together() -> None:
    arrived, release = asyncio.Event(), asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        arrived.set()
        await release.wait()
        await answer(scope, receive, send)

    served = layered(app, max_bodies_bytes=15)
    first = asyncio.create_task(call(served, [b"1234", b"56789"]))
    await arrived.wait()
    for pieces, headers in (([b"1234", b"567"], {}), ([], {"content-length": "7"})):
        sent = await call(served, pieces, headers)
        assert sent[0]["status"] == 503
        assert headers_of(sent)["retry-after"] == "1"
        assert headers_of(sent)["connection"] == "close"
        error = json.loads(sent[1]["body"])["error"]
        assert error["code"] == "overloaded"
        assert "server.max_bodies_bytes" in error["message"]
    second = asyncio.create_task(call(served, [b"123456"], {"content-length": "6"}))
    await call(served, [b"1234567", None])  # who leaves gives back what came
    release.set()
    assert [(await one)[0]["status"] for one in (first, second)] == [200, 200]
    assert (await call(served, [b"1" * 10]))[0]["status"] == 200


async def test_a_body_that_may_come_alone_has_room() -> None:
    assert (await call(layered(answer, max_bodies_bytes=1), [b"1" * 10]))[0]["status"] == 200


async def unreachable(scope: Scope, receive: Receive, send: Send) -> None:
    raise AssertionError("was called")


@pytest.mark.parametrize("pieces", [[b""], [b"", b"", b""]])
async def test_no_body_is_an_empty_one(pieces: list[bytes]) -> None:
    seen: list[Any] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(await receive())
        await answer(scope, receive, send)

    await call(layered(app), pieces)
    assert seen == [{"type": "http.request", "body": b"", "more_body": False}]


async def test_a_get_is_not_read() -> None:
    assert (await call(layered(answer), [], method="GET"))[0]["status"] == 200


async def test_what_comes_after_the_body_is_passed_on() -> None:
    seen: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.extend([(await receive())["type"], (await receive())["type"]])
        await answer(scope, receive, send)

    # As servers do, which say that the client has left when nothing else can come.
    messages: list[Message] = [
        {"type": "http.request", "body": b"1", "more_body": False},
        {"type": "http.disconnect"},
    ]

    async def receive() -> Message:
        return messages.pop(0)

    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    await layered(app)({"type": "http", "method": "POST", "path": "/", "headers": []}, receive, send)
    assert seen == ["http.request", "http.disconnect"]


async def test_other_protocols_pass_through() -> None:
    seen: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope["type"])

    async def receive() -> Message:
        raise AssertionError("was called")

    async def send(message: Message) -> None:
        raise AssertionError("was called")

    await layered(app)({"type": "lifespan"}, receive, send)
    assert seen == ["lifespan"]


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


async def test_a_fault_inside_is_answered_counted_and_logged_without_what_it_held() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        prompt = "a secret"
        raise ValueError(f"inside, at {len(prompt)}")

    registry = CollectorRegistry()
    with capture_logs() as logs:
        sent = await call(layered(app, registry), headers={"x-request-id": "mine"})
    assert sent[0]["status"] == 500
    assert {"x-request-id", "x-penstock-overhead-ms"} <= headers_of(sent).keys()
    assert json.loads(sent[1]["body"])["error"]["code"] == "internal_error"
    fault, summary = logs
    assert (fault["event"], fault["request_id"]) == ("request_broke", "mine")
    assert "ValueError: inside, at 8" in fault["exception"]
    assert "a secret" not in str(logs)
    assert (summary["status"], summary["error"]) == (500, "internal_error")
    assert registry.get_sample_value("penstock_http_requests_in_flight") == 0


async def test_a_fault_in_a_begun_answer_is_passed_on_so_that_it_breaks_off() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise ValueError("inside")

    with capture_logs() as logs, pytest.raises(ValueError, match="inside"):
        await call(layered(app))
    assert (logs[1]["status"], logs[1]["error"]) == (200, "internal_error")


async def test_facts_of_inner_layers_are_in_the_one_event() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        scope["state"]["summary"]["num_prompts"] = 3
        await answer(scope, receive, send)

    with capture_logs() as logs:
        await call(layered(app))
    (event,) = logs
    assert (event["event"], event["num_prompts"], event["status"]) == ("request", 3, 200)
    assert event["seconds"] >= 0
