"""Server-sent events, written and read, and answers that end when their client leaves."""

import asyncio
import contextlib
import re
from collections.abc import AsyncGenerator, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

T = TypeVar("T")

DONE = b"data: [DONE]\n\n"

# The only line ends of the format. Others that Unicode knows, such as U+2028, are text.
_LINE_END = re.compile(rb"\r\n|\n|\r")


def event(data: bytes, name: str | None = None) -> bytes:
    """Return one event. ``data`` may have several lines, whose ends a reader sees as ``\\n``; ``name`` has one."""
    assert name is None or not _LINE_END.search(name.encode()), "a line end would begin another field"
    prefix = b"" if name is None else b"event: " + name.encode() + b"\n"
    if b"\n" not in data and b"\r" not in data:
        return prefix + b"data: " + data + b"\n\n"
    return prefix + b"".join(b"data: " + line + b"\n" for line in _LINE_END.split(data)) + b"\n"


@dataclass(frozen=True, slots=True)
class Event:
    """One event as its reader sees it."""

    data: bytes
    name: str | None = None


class EventTooLarge(ValueError):
    """An event is longer than its reader is willing to hold."""


class EventReader:
    """Puts events together from a stream's bytes, however they were cut into pieces.

    Comments, ids and retry times are skipped, and so is an event without data (HTML Living Standard, 9.2.6).
    """

    def __init__(self, max_event_bytes: int) -> None:
        self._max_event_bytes = max_event_bytes
        self._tail: list[bytes] = []
        """The line that is not complete, in pieces."""
        self._data: list[bytes] = []
        self._name: str | None = None
        self._num_bytes = 0

    def feed(self, piece: bytes) -> list[Event]:
        """Take the next bytes in; return the events they complete. Raises ``EventTooLarge``."""
        self._num_bytes += len(piece)
        if b"\n" not in piece and b"\r" not in piece and not (self._tail and self._tail[-1].endswith(b"\r")):
            if self._num_bytes > self._max_event_bytes:
                raise EventTooLarge(f"an event is larger than {self._max_event_bytes} bytes")
            self._tail.append(piece)
            return []
        self._tail.append(piece)
        data = b"".join(self._tail)
        # A carriage return at the end may be half of a line end.
        half = b"\r" if data.endswith(b"\r") else b""
        *lines, tail = _LINE_END.split(data[: len(data) - len(half)])
        self._tail = [tail + half]
        events = [done for line in lines if (done := self._take(line)) is not None]
        self._num_bytes = len(tail) + sum(map(len, self._data))
        if self._num_bytes > self._max_event_bytes:
            raise EventTooLarge(f"an event is larger than {self._max_event_bytes} bytes")
        return events

    def end(self) -> list[Event]:
        """Return the last event where the stream ended without the empty line that closes it."""
        events = self.feed(b"\n\n")
        self._tail = []
        return events

    def _take(self, line: bytes) -> Event | None:
        if not line:
            data, name = self._data, self._name
            self._data, self._name = [], None
            return Event(b"\n".join(data), name) if data else None
        field, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if field == b"data":
            self._data.append(value)
        elif field == b"event":
            self._name = value.decode(errors="replace")
        return None


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

    def __init__(self, events: AsyncGenerator[bytes, None], headers: Mapping[str, str] | None = None) -> None:
        super().__init__(None, headers={"cache-control": "no-cache", **(headers or {})})
        del self.headers["content-length"]
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send events until there are no more or nobody listens."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await _first_of(asyncio.create_task(self._send_all(send)), receive)

    async def _send_all(self, send: Send) -> None:
        # Leaving may find this task sending instead of waiting for an event; the iterator has to end all the same.
        async with contextlib.aclosing(self._events) as events:
            async for data in events:
                await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
