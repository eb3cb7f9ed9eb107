"""The client's side of running requests: one queue for each, filled by steps, emptied by whoever awaits it."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable

from penstock.engine.messages import Abort, Submit, ToEngine
from penstock.engine.metrics import EngineMetrics
from penstock.errors import InvalidRequest, error_from_code
from penstock.protocol import ErrorInfo, GenerateRequest, TokenDelta


class RequestStreams:
    """Running requests of one event loop. ``max_tokens`` bounds each queue."""

    def __init__(self, send: Callable[[ToEngine], None], metrics: EngineMetrics) -> None:
        self._send = send
        self._metrics = metrics
        self._queues: dict[str, asyncio.Queue[TokenDelta]] = {}
        self._empty = asyncio.Event()
        self._empty.set()

    def __len__(self) -> int:
        return len(self._queues)

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenDelta, None]:
        """Yield the deltas of ``request``; see ``EngineClient.generate``."""
        request_id = request.request_id
        if request_id in self._queues:
            raise InvalidRequest(f"request id {request_id!r} is running already; use another")
        queue: asyncio.Queue[TokenDelta] = asyncio.Queue()
        self._queues[request_id] = queue
        self._empty.clear()
        num_left = request.sampling.n
        self._metrics.started(request)
        try:
            self._send(Submit(request))
            while num_left:
                delta = await queue.get()
                if delta.error is not None:
                    num_left = 0
                    error = delta.error
                    raise error_from_code(
                        error.code, error.message, param=error.param, retry_after_s=error.retry_after_s
                    )
                if delta.finish_reason is not None:
                    num_left -= 1
                yield delta
        finally:
            del self._queues[request_id]
            if not self._queues:
                self._empty.set()
            if num_left:
                self._metrics.aborted(request_id)
                self._send(Abort(request_id))

    def dispatch(self, deltas: Iterable[TokenDelta]) -> None:
        """Hand each delta to who awaits it; deltas of requests that have left are dropped."""
        for delta in deltas:
            queue = self._queues.get(delta.request_id)
            if queue is not None:
                self._metrics.observe(delta)
                queue.put_nowait(delta)

    def fail_all(self, error: ErrorInfo) -> None:
        """End every running request with ``error``."""
        self.dispatch([TokenDelta(request_id=name, finish_reason="error", error=error) for name in list(self._queues)])

    async def wait_empty(self, timeout_s: float) -> bool:
        """Wait until nothing runs; False if something still does at the timeout."""
        try:
            await asyncio.wait_for(self._empty.wait(), timeout_s)
        except TimeoutError:
            return False
        return True
