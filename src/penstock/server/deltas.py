"""The deltas of one HTTP request, which may be several requests to the engine."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator

from penstock.http.middleware import Waited
from penstock.protocol import EngineClient, GenerateRequest, TokenDelta

Deltas = AsyncGenerator[tuple[int, TokenDelta], None]
"""(which prompt, delta)"""


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
