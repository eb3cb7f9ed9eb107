"""An engine in this process: its step loop on a thread of its own, for tests, batch jobs and the edge."""

import asyncio
import queue
import threading
from collections.abc import AsyncGenerator, Callable
from typing import Literal

import msgspec

from penstock.engine.adapters import AdapterCalls
from penstock.engine.host import EngineHost, SteppedEngine
from penstock.engine.messages import Loaded, LoadFailed, Stepped, ToEngine, error_info
from penstock.engine.metrics import EngineMetrics
from penstock.engine.streams import RequestStreams
from penstock.errors import Draining, InternalError, NotReady, PenstockError, error_from_code
from penstock.protocol import EngineState, EngineStatus, ErrorInfo, GenerateRequest, ModelInfo, TokenDelta


class InProcessClient:
    """An ``EngineClient`` whose engine shares this process."""

    def __init__(self, build: Callable[[], SteppedEngine], metrics: EngineMetrics | None = None) -> None:
        """``build`` loads the engine; it is called on the engine's thread."""
        self._build = build
        self._inbox: queue.SimpleQueue[ToEngine | Literal["wake", "end"]] = queue.SimpleQueue()
        self.metrics = metrics or EngineMetrics()
        self.metrics.watch(self.status)
        self._streams = RequestStreams(self._inbox.put, self.metrics)
        self._adapters = AdapterCalls(self._inbox.put)
        self._status = EngineStatus(state=EngineState.LOADING)
        self._model: ModelInfo | None = None
        self._draining = False
        self._thread: threading.Thread | None = None

    async def start(self) -> None:
        """Load the engine; see ``EngineClient.start``."""
        loop = asyncio.get_running_loop()
        loaded: asyncio.Future[Loaded | LoadFailed] = loop.create_future()

        def deliver(message: Loaded | LoadFailed | Stepped) -> None:
            if isinstance(message, Stepped):
                self._status = message.status
                self._streams.dispatch(message.deltas)
                self._adapters.dispatch(message.answers)
            elif not loaded.done():
                loaded.set_result(message)
            elif isinstance(message, LoadFailed):
                self._streams.fail_all(message.error)

        def run() -> None:
            try:
                self._run(lambda message: loop.call_soon_threadsafe(deliver, message))
            except RuntimeError:
                if not loop.is_closed():
                    raise

        self._thread = threading.Thread(target=run, name="penstock-engine", daemon=True)
        self._thread.start()
        message = await loaded
        if isinstance(message, LoadFailed):
            self._status = EngineStatus(state=EngineState.FAILED, reason=message.error.message)
            raise error_from_code(message.error.code, message.error.message, param=message.error.param)
        self._model, self._status = message.model, message.status

    def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenDelta, None]:
        """Yield deltas; see ``EngineClient.generate``."""
        if self._draining:
            raise Draining("the engine is shutting down; send the request elsewhere", retry_after_s=1.0)
        self.model()
        return self._streams.generate(request)

    def status(self) -> EngineStatus:
        """Return the engine's latest word about itself."""
        state = EngineState.DRAINING if self._draining else self._status.state
        return msgspec.structs.replace(self._status, state=state, model=self._model)

    def model(self) -> ModelInfo:
        """Return what is served. Raises ``NotReady`` before the engine has loaded."""
        if self._model is None:
            raise NotReady("the model is still loading; retry in a moment", retry_after_s=1.0)
        return self._model

    async def load_adapter(self, name: str, path: str) -> None:
        """Load a LoRA adapter; see ``EngineClient.load_adapter``."""
        self.model()
        await self._adapters.load(name, path)

    async def unload_adapter(self, name: str) -> None:
        """Take no more requests for an adapter."""
        self.model()
        await self._adapters.unload(name)

    def adapters(self) -> tuple[str, ...]:
        """Return the names of the loaded adapters."""
        return self._adapters.names

    async def drain(self, timeout_s: float) -> bool:
        """Refuse new requests and wait for the running ones."""
        self._draining = True
        return await self._streams.wait_empty(timeout_s)

    async def stop(self) -> None:
        """Abort what runs and end the thread."""
        self._draining = True
        stopped = error_info(Draining("the engine was stopped", retry_after_s=1.0))
        self._streams.fail_all(stopped)
        self._adapters.fail_all(stopped)
        if self._thread is not None:
            self._inbox.put("end")
            await asyncio.to_thread(self._thread.join)
            self._thread = None

    def _run(self, deliver: Callable[[Loaded | LoadFailed | Stepped], object]) -> None:
        """Own the engine: load, then take messages and step until told to end."""
        try:
            host = EngineHost(self._build(), lambda: self._inbox.put("wake"))
        except PenstockError as error:
            deliver(LoadFailed(error_info(error)))
            return
        except Exception as error:  # the loader's thread must answer whoever awaits it
            deliver(LoadFailed(error_info(InternalError(f"the engine could not load: {error!r}"))))
            return
        deliver(host.loaded())
        try:
            while True:
                # Waiting is for when there is nothing to do; otherwise take what has come and go on.
                if self._take_messages(host) is False:
                    return
                deliver(host.step())
        except Exception as error:  # without this thread every request would wait for ever
            deliver(LoadFailed(ErrorInfo(code=InternalError.code, message=f"the engine's loop failed: {error!r}")))
            raise
        finally:
            host.close()

    def _take_messages(self, host: EngineHost) -> bool:
        """Handle what has arrived, waiting if the engine is idle; False means end."""
        while True:
            try:
                message = self._inbox.get(block=not host.has_work)
            except queue.Empty:
                return True
            if message == "end":
                return False
            if message != "wake":
                host.handle(message)
