"""An engine in a process of its own: msgpack over ZeroMQ, watched, and started again when it dies.

The client writes the settings to the worker's standard input, length first, and keeps that pipe open: when it closes,
the worker knows that nobody is left to serve, and ends.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Callable

import msgspec

from penstock.engine.adapters import AdapterCalls
from penstock.engine.child import ChildProcess, exit_reason
from penstock.engine.messages import FromEngine, Loaded, LoadFailed, Stepped, Submit, ToEngine
from penstock.engine.metrics import EngineMetrics
from penstock.engine.spawning import Spawned, spawn
from penstock.engine.streams import RequestStreams
from penstock.errors import (
    Draining,
    InternalError,
    NotReady,
    WorkerDied,
    error_from_code,
)
from penstock.protocol import EngineState, EngineStatus, ErrorInfo, GenerateRequest, ModelInfo, TokenDelta
from penstock.telemetry import get_logger

_log = get_logger(__name__)

_FIRST_DELAY_S = 0.1
_LONGEST_DELAY_S = 10.0
_MOST_FAILED_STARTS = 5
"""Restarts in a row that may fail before the engine is given up."""
STALL_S = 30.0
"""With work to do and no finished step for this long, the engine is not ready."""


class ProcessClient:
    """An ``EngineClient`` whose engine is a child process."""

    def __init__(
        self,
        command: list[str],
        payload: bytes,
        metrics: EngineMetrics | None = None,
        clock: Callable[[], float] = time.monotonic,
        spawned: Spawned | None = None,
    ) -> None:
        """``command``, given the address to connect to as its last argument, runs ``worker.run_worker``.

        ``spawned`` is the first such process, if it was started already.
        """
        self._command = command
        self._payload = payload
        self._spawned = spawned
        self.metrics = metrics or EngineMetrics()
        self.metrics.watch(self.status)
        self._streams = RequestStreams(self._send, self.metrics)
        self._adapters = AdapterCalls(self._send)
        self._status = EngineStatus(state=EngineState.LOADING)
        self._state = EngineState.LOADING
        self._reason: str | None = "the model is loading"
        self._model: ModelInfo | None = None
        self._num_restarts = 0
        self._clock = clock
        self._last_message_s = clock()
        self._busy_since_s = self._last_message_s
        """When a request came to an engine that had none."""
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine)
        self._worker: ChildProcess | None = None
        self._watcher: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int | None:
        """The engine process, if one runs."""
        return None if self._worker is None else self._worker.pid

    async def start(self) -> None:
        """Start the process and wait until it has loaded; see ``EngineClient.start``."""
        self._worker = ChildProcess(self._spawned or spawn(self._command, self._payload))
        error = await self._wait_loaded(self._worker)
        if error is not None:
            self._state, self._reason = EngineState.FAILED, error.message
            await self._worker.close()
            raise error_from_code(error.code, error.message, param=error.param)
        self._watcher = asyncio.create_task(self._watch())

    def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenDelta, None]:
        """Yield deltas; see ``EngineClient.generate``."""
        self._require_ready()
        return self._streams.generate(request)

    async def load_adapter(self, name: str, path: str) -> None:
        """Load a LoRA adapter, again after a restart; see ``EngineClient.load_adapter``."""
        self._require_ready()
        await self._adapters.load(name, path)

    async def unload_adapter(self, name: str) -> None:
        """Take no more requests for an adapter."""
        self._require_ready()
        await self._adapters.unload(name)

    def adapters(self) -> tuple[str, ...]:
        """Return the names of the loaded adapters."""
        return self._adapters.names

    def _require_ready(self) -> None:
        if self._state is EngineState.DRAINING or self._state is EngineState.STOPPED:
            raise Draining("the server is shutting down; send the request elsewhere", retry_after_s=1.0)
        if self._state is not EngineState.READY:
            raise NotReady(f"the engine takes no requests now: {self._reason}; retry in a moment", retry_after_s=1.0)

    def status(self) -> EngineStatus:
        """Return the engine's latest word about itself, or what became of it."""
        state, reason = self._state, self._reason
        now_s = self._clock()
        # Silence before there was work is rest.
        silent_s = now_s - max(self._last_message_s, self._busy_since_s)
        if state is EngineState.READY and len(self._streams) and silent_s > STALL_S:
            state, reason = EngineState.STALLED, f"there is work and no step has finished for {silent_s:.0f} s"
        last_step_age_s = self._status.last_step_age_s
        return msgspec.structs.replace(
            self._status,
            state=state,
            reason=reason,
            model=self._model,
            num_restarts=self._num_restarts,
            last_step_age_s=None if last_step_age_s is None else last_step_age_s + now_s - self._last_message_s,
        )

    def model(self) -> ModelInfo:
        """Return what is served. Raises ``NotReady`` before the engine has loaded once."""
        if self._model is None:
            raise NotReady("the model is still loading; retry in a moment", retry_after_s=1.0)
        return self._model

    def model_or_none(self) -> ModelInfo | None:
        """Return what is served, None before the engine has loaded once."""
        return self._model

    async def drain(self, timeout_s: float) -> bool:
        """Refuse new requests and wait for the running ones."""
        self._state, self._reason = EngineState.DRAINING, "the server is shutting down"
        return await self._streams.wait_empty(timeout_s)

    async def stop(self) -> None:
        """Abort what runs and end the process."""
        self._state, self._reason = EngineState.STOPPED, "the server has stopped"
        if self._watcher is not None:
            self._watcher.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watcher
            self._watcher = None
        self._fail_all(ErrorInfo(code=Draining.code, message="the server was stopped", retry_after_s=1.0))
        if self._worker is not None:
            await self._worker.close()
            self._worker = None

    def _fail_all(self, error: ErrorInfo) -> None:
        self._streams.fail_all(error)
        self._adapters.fail_all(error)

    def _send(self, message: ToEngine) -> None:
        if isinstance(message, Submit) and len(self._streams) == 1:
            self._busy_since_s = self._clock()
        if self._worker is not None:
            self._worker.send(self._encoder.encode(message))

    async def _wait_loaded(self, worker: ChildProcess) -> ErrorInfo | None:
        """Wait for the worker's first word; an error if it cannot start or dies before."""
        data = await worker.until_dead(worker.receive())
        if data is None:
            with contextlib.suppress(TimeoutError):
                data = await asyncio.wait_for(worker.receive(), 0.5)  # its last words may be on the way
        if data is None:
            how = exit_reason(worker.returncode)
            return ErrorInfo(code=InternalError.code, message=f"the engine process {how} while it loaded; see its log")
        message = self._decoder.decode(data)
        if isinstance(message, LoadFailed):
            return message.error
        assert isinstance(message, Loaded), "an engine's first message says whether it has loaded"
        self._model, self._status = message.model, message.status
        self._last_message_s = self._clock()
        if self._state in (EngineState.LOADING, EngineState.RESTARTING):
            self._state, self._reason = EngineState.READY, None
        return None

    async def _watch(self) -> None:
        """Deliver what the worker says; when it dies, fail its requests and start another."""
        while self._worker is not None:
            await self._worker.until_dead(self._relay(self._worker))
            how = exit_reason(self._worker.returncode)
            _log.error("engine_died", how=how, num_requests=len(self._streams))
            draining = self._state is EngineState.DRAINING
            if not draining:
                self._state, self._reason = (
                    EngineState.RESTARTING,
                    f"the engine process {how} and is being restarted",
                )
            self._fail_all(
                ErrorInfo(
                    code=WorkerDied.code,
                    message=f"the engine process {how} while this request ran; it is being restarted: retry",
                    retry_after_s=1.0,
                )
            )
            await self._worker.close()
            self._worker = None
            if draining or not await self._restart():
                return

    async def _relay(self, worker: ChildProcess) -> None:
        """Hand messages on, for ever."""
        while True:
            data = await worker.receive()
            message = self._decoder.decode(data)
            if isinstance(message, Stepped):
                self._status = message.status
                self._last_message_s = self._clock()
                self._streams.dispatch(message.deltas)
                self._adapters.dispatch(message.answers)

    async def _restart(self) -> bool:
        delay_s = _FIRST_DELAY_S
        for attempt in range(1, _MOST_FAILED_STARTS + 1):
            self._num_restarts += 1
            worker = ChildProcess(spawn(self._command, self._payload))
            self._worker = worker
            error = await self._wait_loaded(worker)
            if error is None:
                self._adapters.reload()
                _log.info("engine_restarted", attempt=attempt)
                return True
            _log.error("engine_restart_failed", attempt=attempt, reason=error.message)
            await worker.close()
            self._worker = None
            self._reason = f"the engine could not be restarted: {error.message}"
            await asyncio.sleep(delay_s)
            delay_s = min(2 * delay_s, _LONGEST_DELAY_S)
        self._state = EngineState.FAILED
        return False
