"""Pure ASGI middleware: request ids, body limits, one summary event and metrics for each request."""

import asyncio
import contextlib
import re
import time
import traceback
import uuid
from collections.abc import Iterator
from typing import Any

import msgspec
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from penstock.errors import InternalError, OverLimit, Overloaded, PenstockError
from penstock.http.errors import CLIENT_LEFT, error_body_at, error_headers, is_anthropics, status_of
from penstock.http.sse import ClientLeft
from penstock.http.trace import continue_trace
from penstock.telemetry import BoundedLabels, get_logger

_log = get_logger("penstock.request")

# Nothing that could end a header or a line of a log, and no more than a log should carry.
_SANE_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_SECONDS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)

_LINGER_S = 5.0
"""How long a client whose body is refused may go on sending it."""


class HTTPMetrics:
    """What HTTP requests did, by route."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.requests = Counter(
            "penstock_http_requests", "HTTP requests answered.", ("route", "method", "code"), registry=registry
        )
        self.seconds = Histogram(
            "penstock_http_request_seconds",
            "Time from a request's head to its answer's end.",
            ("route",),
            buckets=_SECONDS,
            registry=registry,
        )
        self.in_flight = Gauge("penstock_http_requests_in_flight", "HTTP requests being answered.", registry=registry)
        self.label = BoundedLabels()


class Waited:
    """Seconds of one request that passed while waiting for its client or for the engine."""

    def __init__(self) -> None:
        self.seconds = 0.0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the block's time."""
        began_s = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - began_s


class RequestMiddleware:
    """The outermost layer: names each request, measures it, and says in one event what became of it.

    Every answer carries

    - ``x-request-id``: the caller's, if it is up to 128 letters, digits and ``. _ : -``; else one made here. Where
      Anthropic's clients look for it, it is ``request-id`` as well.
    - ``traceparent``, if the request had a valid one: the caller's trace id with this request's own span.
    - ``x-penstock-overhead-ms``: what this process added to the time its client and the engine took, in milliseconds.
      That is the time from the request's head to the answer's, less what was spent waiting for the body to arrive
      and for the engine's tokens: parsing, checking, rendering, tokenizing, encoding, and waiting for this process's
      event loop and threads to get to them. A whole answer's head goes out with its body, a stream's with its first
      event; later events are not counted. Neither is the time between the engine's delivery of a token and the event
      loop's noticing it, which cannot be told from waiting for the engine.

    Inner layers add facts for the event to ``scope["state"]["summary"]``, and to ``scope["state"]["waited"]`` (see
    ``Waited``) what was not this process's doing. A fault that nobody caught is answered 500 and logged with its
    traceback, or, where an answer has begun, passed on, so that the server breaks the answer off.
    """

    def __init__(self, app: ASGIApp, metrics: HTTPMetrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started_s = time.perf_counter()
        headers = Headers(scope=scope)
        offered = headers.get("x-request-id", "")
        request_id = offered if _SANE_ID.fullmatch(offered) else uuid.uuid4().hex
        trace = continue_trace(headers.getlist("traceparent"))
        summary: dict[str, Any] = {} if trace is None else {"trace_id": trace.trace_id, "span_id": trace.span_id}
        waited = Waited()
        scope.setdefault("state", {}).update(summary=summary, request_id=request_id, waited=waited)
        status: int | None = None

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                overhead_s = max(0.0, time.perf_counter() - started_s - waited.seconds)
                answered = MutableHeaders(scope=message)
                answered["x-request-id"] = request_id
                if is_anthropics(scope["path"]):
                    answered["request-id"] = request_id
                answered["x-penstock-overhead-ms"] = f"{overhead_s * 1e3:.3f}"
                if trace is not None:
                    answered["traceparent"] = trace.traceparent
            await send(message)

        self._metrics.in_flight.inc()
        try:
            await self._app(scope, receive, send_with_headers)
        except ClientLeft:
            status = CLIENT_LEFT
        except Exception:  # nobody is left to answer for it but this layer
            summary["error"] = InternalError.code
            # As text: a renderer that shows frames would show what is in them, prompts included.
            _log.error("request_broke", request_id=request_id, exception=traceback.format_exc())
            if status is not None:
                raise
            error = InternalError("the server failed on this request; its log has the details")
            await send_error(scope, send_with_headers, error)
        finally:
            self._metrics.in_flight.dec()
            self._finish(scope, request_id, 500 if status is None else status, time.perf_counter() - started_s, summary)

    def _finish(self, scope: Scope, request_id: str, status: int, seconds: float, summary: dict[str, Any]) -> None:
        route = self._metrics.label(getattr(scope.get("route"), "path", "unmatched"))
        method = self._metrics.label(scope["method"])
        self._metrics.requests.labels(route, method, str(status)).inc()
        self._metrics.seconds.labels(route).observe(seconds)
        is_probe = route.startswith(("/health", "/metrics", "/ping", "/readyz"))
        log = _log.debug if is_probe else _log.info
        log(
            "request",
            request_id=request_id,
            method=scope["method"],
            route=route,
            status=status,
            seconds=round(seconds, 6),
            **summary,
        )


class BodyLimit:
    """Reads the whole body first and answers 413 to one that is larger than allowed, whatever its headers say.

    What all requests in flight have sent is bounded as well, for each is kept until it is answered: 503 to one for
    which there is no room. Only what has arrived counts, so that nobody takes room by announcing much.
    """

    def __init__(self, app: ASGIApp, max_body_bytes: int, max_bodies_bytes: int) -> None:
        """``max_bodies_bytes`` are those of all bodies, of which the largest has room in any case."""
        self._app = app
        self._max_body_bytes = max_body_bytes
        self._max_bodies_bytes = max(max_body_bytes, max_bodies_bytes)
        self._held_bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http" or scope["method"] not in ("POST", "PUT", "PATCH", "DELETE"):
            await self._app(scope, receive, send)
            return
        declared = Headers(scope=scope).get("content-length", "")
        # No other digits than ASCII's, and no more of them than an integer may have; what is no number is not believed.
        announced = int(declared[:20]) if declared.isascii() and declared.isdigit() else 0
        pieces: list[bytes] = []
        size = 0
        more = True
        error = self._refusal(announced, self._held_bytes + announced)
        waited = scope["state"]["waited"]
        try:
            while more and error is None:
                with waited.waiting():
                    message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientLeft
                pieces.append(message.get("body", b""))
                size += len(pieces[-1])
                self._held_bytes += len(pieces[-1])
                more = message.get("more_body", False)
                error = self._refusal(size, self._held_bytes)
            if error is None:
                whole = b"".join(pieces)
                pieces.clear()
                await self._app(scope, _replaying(whole, receive), send)
        finally:
            self._held_bytes -= size
        if error is not None:
            pieces.clear()
            await self._refuse(error, scope, receive, send, more)

    def _refusal(self, size: int, held_bytes: int) -> PenstockError | None:
        """Return what is wrong with a body of ``size``, with which there are ``held_bytes`` of all; None: nothing."""
        if size > self._max_body_bytes:
            return OverLimit(f"the body is larger than the {self._max_body_bytes} bytes this server reads; send less")
        if held_bytes > self._max_bodies_bytes:
            return Overloaded(
                f"the bodies of all requests that are being answered would take more than the "
                f"{self._max_bodies_bytes} bytes this server keeps (server.max_bodies_bytes): retry in a moment",
                retry_after_s=1.0,
            )
        return None

    async def _refuse(self, error: PenstockError, scope: Scope, receive: Receive, send: Send, more: bool) -> None:
        """Answer with an error, and go on reading for a while: a connection that is closed on unread bytes is reset,
        and its client, still sending, would never see the answer.
        """
        scope["state"]["summary"]["error"] = error.code
        await send_error(scope, send, error, (b"connection", b"close"), is_end=False)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LINGER_S):
                while more:
                    more = (await receive()).get("more_body", False)
        await send({"type": "http.response.body", "body": b""})


def _replaying(body: bytes, receive: Receive) -> Receive:
    """Return what hands out ``body``, and then what comes after it."""
    whole: Message | None = {"type": "http.request", "body": body, "more_body": False}

    async def replay() -> Message:
        nonlocal whole
        if whole is None:
            return await receive()
        message, whole = whole, None
        return message

    return replay


async def send_error(
    scope: Scope, send: Send, error: PenstockError, *headers: tuple[bytes, bytes], is_end: bool = True
) -> None:
    """Answer with an error where no framework is at hand to do it."""
    body = msgspec.json.encode(error_body_at(scope["path"], error))
    own = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    own += [(name.encode(), value.encode()) for name, value in error_headers(error).items()]
    await send({"type": "http.response.start", "status": status_of(error), "headers": [*own, *headers]})
    await send({"type": "http.response.body", "body": body, "more_body": not is_end})
