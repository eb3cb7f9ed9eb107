"""One answer as events, for the wire forms that have one answer a request."""

import contextlib
from collections.abc import AsyncGenerator, Sequence
from typing import Any, Protocol

import msgspec

from penstock.errors import PenstockError
from penstock.http import sse
from penstock.protocol import TokenDelta, TokenLogprobs
from penstock.server.reading import AnswerReader, Reading, Reasoning
from penstock.server.streaming import Deltas, Tally, guarded
from penstock.text.tool_formats import Event

Said = dict[str, Any]
"""An event of a stream; its ``type`` is its name."""


class Form(Protocol):
    """A wire form in the making. Its methods return what a stream says at that point."""

    def begin(self) -> list[Said]:
        """Begin the answer."""

    def push(self, event: Event | Reasoning, logprobs: Sequence[TokenLogprobs]) -> list[Said]:
        """Add what the model said next; ``logprobs`` are of the tokens that made it certain."""

    def end(self, last: TokenDelta, tally: Tally) -> list[Said]:
        """End the answer, whose last delta was ``last``. Its timeline is there if the client wants it."""

    def fail(self, error: PenstockError) -> list[Said]:
        """End the answer with an error."""

    def body(self) -> dict[str, Any]:
        """Return the response as it is now."""


class Turn:
    """An ``Answering`` that reads one choice of one prompt into a ``Form``."""

    def __init__(self, form: Form, reading: Reading, summary: dict[str, Any], *, wants_timeline: bool) -> None:
        self._wants_timeline = wants_timeline
        self._form = form
        self._reader = AnswerReader(reading)
        self._summary = summary
        self._tally = Tally(summary)
        self._logprobs: list[TokenLogprobs] = []
        """Of tokens that made nothing certain yet"""

    async def whole(self, deltas: Deltas) -> dict[str, Any]:
        """Take all deltas in and return the response's body."""
        async for _, delta in deltas:
            self._take(delta)
        return self._form.body()

    def stream(self, deltas: Deltas) -> AsyncGenerator[bytes, None]:
        """Yield server-sent events; an error after the first byte is said in the form's own way."""
        return guarded(self._stream(deltas), lambda error: map(_event, self._form.fail(error)), self._summary)

    async def _stream(self, deltas: Deltas) -> AsyncGenerator[bytes, None]:
        async with contextlib.aclosing(deltas):
            for said in self._form.begin():
                yield _event(said)
            async for _, delta in deltas:
                for said in self._take(delta):
                    yield _event(said)

    def _take(self, delta: TokenDelta) -> list[Said]:
        is_last = delta.finish_reason is not None
        was_reasoning = self._reader.is_reasoning
        events = self._reader.push(delta.text, is_last=is_last)
        if was_reasoning or any(isinstance(event, Reasoning) for event in events):
            self._tally.num_reasoning_tokens += len(delta.token_ids)
        self._logprobs.extend(delta.logprobs)
        said = []
        for event in events[:-1]:
            said += self._form.push(event, ())
        for event in events[-1:]:
            said += self._form.push(event, self._logprobs)
            self._logprobs = []
        if is_last:
            self._tally.add(0, delta)
            last = delta if self._wants_timeline else msgspec.structs.replace(delta, timeline=None)
            said += self._form.end(last, self._tally)
        return said


def _event(said: Said) -> bytes:
    return sse.event(msgspec.json.encode(said), said["type"])
