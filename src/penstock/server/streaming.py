"""Between the engine's deltas and a response: merging, waiting, counting, and failing in mid-stream."""

import asyncio
import contextlib
import traceback
from collections.abc import AsyncGenerator, Callable, Iterable
from typing import Any, Protocol

import msgspec

from penstock.errors import InternalError, PenstockError
from penstock.http.middleware import Waited
from penstock.protocol import EngineClient, GenerateRequest, TokenDelta
from penstock.telemetry import get_logger

_log = get_logger(__name__)

Deltas = AsyncGenerator[tuple[int, TokenDelta], None]
"""(which prompt, delta)"""


class Answering(Protocol):
    """What deltas become on the wire."""

    async def whole(self, deltas: Deltas) -> dict[str, Any]:
        """Take all deltas in and return the response's body."""

    def stream(self, deltas: Deltas) -> AsyncGenerator[bytes, None]:
        """Yield server-sent events."""


class Tally:
    """What one HTTP request cost, for its usage and for its event in the log."""

    def __init__(self, summary: dict[str, Any]) -> None:
        self._summary = summary
        self._prompt_tokens: dict[int, int] = {}
        self.num_cached_tokens = 0
        self.num_output_tokens = 0
        self.num_reasoning_tokens = 0
        """Of the output, for forms that say it"""

    @property
    def num_prompt_tokens(self) -> int:
        """Of all prompts whose answers have begun to end."""
        return sum(self._prompt_tokens.values())

    def add(self, prompt: int, last: TokenDelta, *, hides_output: bool = False) -> None:
        """Count the last delta of a choice for prompt number ``prompt``."""
        usage = last.usage
        if usage is not None:
            if prompt not in self._prompt_tokens:
                self.num_cached_tokens += usage.num_cached_tokens
            self._prompt_tokens[prompt] = usage.num_prompt_tokens
            self.num_output_tokens += 0 if hides_output else usage.num_output_tokens
        self._summary.update(
            num_prompt_tokens=self.num_prompt_tokens,
            num_cached_tokens=self.num_cached_tokens,
            num_output_tokens=self.num_output_tokens,
            finish_reason=last.finish_reason,
        )
        if last.timeline is not None:
            self._summary["timeline"] = msgspec.to_builtins(last.timeline)


async def guarded(
    events: AsyncGenerator[bytes, None], failed: Callable[[PenstockError], Iterable[bytes]], summary: dict[str, Any]
) -> AsyncGenerator[bytes, None]:
    """Yield ``events``; where they break, what ``failed`` makes of the error, and no more.

    The status has been sent by then: an event is the only way left to say it.
    """
    try:
        async with contextlib.aclosing(events):
            async for event in events:
                yield event
        return
    except PenstockError as error:
        known = error
    except Exception:  # whatever it was, the client has to hear of it
        # As text: a renderer that shows frames would show what is in them, prompts included.
        _log.error("stream_broke", answer_id=summary.get("answer_id"), exception=traceback.format_exc())
        known = InternalError("the server failed on this request; its log has the details")
    summary["error"] = known.code
    for event in failed(known):
        yield event


async def measured(deltas: Deltas, waited: Waited) -> AsyncGenerator[tuple[int, TokenDelta], None]:
    """Yield ``deltas``, counting the time until each."""
    async with contextlib.aclosing(deltas):
        while True:
            try:
                with waited.waiting():
                    item = await anext(deltas)
            except StopAsyncIteration:
                return
            yield item


async def begun(deltas: Deltas) -> Deltas:
    """Wait for the first delta, which is when a refusal would be known; return all of them."""
    first = await anext(deltas)

    async def run() -> AsyncGenerator[tuple[int, TokenDelta], None]:
        async with contextlib.aclosing(deltas):
            yield first
            async for item in deltas:
                yield item

    return run()


async def merged(client: EngineClient, requests: list[GenerateRequest]) -> AsyncGenerator[tuple[int, TokenDelta], None]:
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
