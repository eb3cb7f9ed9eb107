"""Server-sent events, and answers that end when their client leaves."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Coroutine, Mapping
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

T = TypeVar("T")

DONE = b"data: [DONE]\n\n"


def event(data: bytes, name: str | None = None) -> bytes:
    """Return one event; ``data`` is a single line."""
    prefix = b"" if name is None else b"event: " + name.encode() + b"\n"
    return prefix + b"data: " + data + b"\n\n"


class ClientLeft(Exception):
    """The client closed the connection before its answer was ready."""


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _first_of(work: "asyncio.Task[T]", receive: Receive) -> T:
    """Return what ``work`` returns; if the client leaves first, cancel it, wait for its end, raise ``ClientLeft``."""
    watcher = asyncio.create_task(_left(receive))
    try:
        await asyncio.wait({work, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            return work.result()
        raise ClientLeft
    finally:
        for task in (work, watcher):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await task


async def until_client_leaves(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Await ``work``, but no longer than its client does. Raises ``ClientLeft``."""
    return await _first_of(asyncio.create_task(work), request.receive)


class EventStream(Response):
    """A response of server-sent events. When the client leaves, the iterator is closed at once."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], headers: Mapping[str, str] | None = None) -> None:
        super().__init__(None, headers={"cache-control": "no-cache", **(headers or {})})
        del self.headers["content-length"]
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send events until there are no more or nobody listens."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await _first_of(asyncio.create_task(self._send_all(send)), receive)

    async def _send_all(self, send: Send) -> None:
        async for data in self._events:
            await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
