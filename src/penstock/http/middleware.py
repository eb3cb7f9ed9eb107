"""Pure ASGI middleware: request ids, body limits, one summary event and metrics for each request."""

import contextlib
import re
import time
import uuid
from collections.abc import Iterator
from typing import Any

import msgspec
import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from penstock.errors import OverLimit
from penstock.http.errors import CLIENT_LEFT, error_body
from penstock.http.sse import ClientLeft
from penstock.telemetry import BoundedLabels

_log = structlog.get_logger("penstock.request")

_SANE_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")
"""W3C Trace Context, level 1, section 3.2: version, trace id, parent id, flags."""
_SECONDS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


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
    """The outermost layer: gives each request an id, measures it, and says in one event what became of it.

    Inner layers add facts for that event to ``scope["state"]["summary"]``, and to ``scope["state"]["waited"]``
    (see ``Waited``) what was not this process's doing. The header ``x-penstock-overhead-ms`` is the rest, up to the
    answer's head: what this process added to the time its client and the engine took.
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
        summary: dict[str, Any] = {}
        waited = Waited()
        scope.setdefault("state", {}).update(summary=summary, request_id=request_id, waited=waited)
        status = 500

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                overhead_ms = (time.perf_counter() - started_s - waited.seconds) * 1e3
                answered = MutableHeaders(scope=message)
                answered["x-request-id"] = request_id
                answered["x-penstock-overhead-ms"] = f"{overhead_ms:.3f}"
            await send(message)

        self._metrics.in_flight.inc()
        try:
            await self._app(scope, receive, send_with_id)
        except ClientLeft:
            status = CLIENT_LEFT
        finally:
            self._metrics.in_flight.dec()
            self._finish(scope, headers, request_id, status, time.perf_counter() - started_s, summary)

    def _finish(
        self, scope: Scope, headers: Headers, request_id: str, status: int, seconds: float, summary: dict[str, Any]
    ) -> None:
        route = self._metrics.label(getattr(scope.get("route"), "path", "unmatched"))
        method = self._metrics.label(scope["method"])
        self._metrics.requests.labels(route, method, str(status)).inc()
        self._metrics.seconds.labels(route).observe(seconds)
        is_probe = route.startswith(("/health", "/metrics", "/ping", "/readyz"))
        log = _log.debug if is_probe else _log.info
        trace = _TRACEPARENT.fullmatch(headers.get("traceparent", ""))
        log(
            "request",
            request_id=request_id,
            method=scope["method"],
            route=route,
            status=status,
            seconds=round(seconds, 6),
            **({"trace_id": trace[1]} if trace else {}),
            **summary,
        )


class BodyLimit:
    """Reads the whole body first and answers 413 to one that is larger than allowed, whatever its headers say."""

    def __init__(self, app: ASGIApp, max_body_bytes: int) -> None:
        self._app = app
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http" or scope["method"] not in ("POST", "PUT", "PATCH", "DELETE"):
            await self._app(scope, receive, send)
            return
        declared = Headers(scope=scope).get("content-length", "0")
        pieces: list[bytes] = []
        size = 0
        more = True
        too_large = declared.isdigit() and int(declared) > self._max_body_bytes
        waited = scope["state"]["waited"]
        while more and not too_large:
            with waited.waiting():
                message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientLeft
            pieces.append(message.get("body", b""))
            size += len(pieces[-1])
            more = message.get("more_body", False)
            too_large = size > self._max_body_bytes
        if too_large:
            await self._refuse(send)
            return
        whole: Message | None = {"type": "http.request", "body": b"".join(pieces), "more_body": False}

        async def replay() -> Message:
            nonlocal whole
            if whole is None:
                return await receive()
            message, whole = whole, None
            return message

        await self._app(scope, replay, send)

    async def _refuse(self, send: Send) -> None:
        error = OverLimit(f"the body is larger than the {self._max_body_bytes} bytes this server reads; send less")
        body = msgspec.json.encode(error_body(error))
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
        ]
        await send({"type": "http.response.start", "status": 413, "headers": headers})
        await send({"type": "http.response.body", "body": body})
