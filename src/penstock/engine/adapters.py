"""The client's side of adapters: calls that await the engine's answer, and which adapters are loaded."""

import asyncio
from collections.abc import Callable, Iterable

from penstock.engine.messages import Answer, LoadAdapter, ToEngine, UnloadAdapter
from penstock.errors import error_from_code
from penstock.protocol import ErrorInfo


class AdapterCalls:
    """Adapters of one engine, as its client knows them. Belongs to one event loop."""

    def __init__(self, send: Callable[[ToEngine], None]) -> None:
        self._send = send
        self._paths: dict[str, str] = {}
        self._waiting: dict[int, asyncio.Future[ErrorInfo | None]] = {}
        self._reloading: dict[int, str] = {}
        self._next_call = 0

    @property
    def names(self) -> tuple[str, ...]:
        """What is loaded, in the order it came."""
        return tuple(self._paths)

    async def load(self, name: str, path: str) -> None:
        """Load the adapter in directory ``path`` as ``name``. Raises what the engine does."""
        await self._ask(lambda call: LoadAdapter(call, name, path))
        self._paths[name] = path

    async def unload(self, name: str) -> None:
        """Take no more requests for ``name``. Raises what the engine does."""
        await self._ask(lambda call: UnloadAdapter(call, name))
        self._paths.pop(name, None)

    def dispatch(self, answers: Iterable[Answer]) -> None:
        """Hand each answer to who awaits it."""
        for answer in answers:
            waiting = self._waiting.pop(answer.call, None)
            if waiting is not None and not waiting.done():
                waiting.set_result(answer.error)
            reloaded = self._reloading.pop(answer.call, None)
            if reloaded is not None and answer.error is not None:
                self._paths.pop(reloaded, None)

    def fail_all(self, error: ErrorInfo) -> None:
        """End every call with ``error``."""
        self.dispatch([Answer(call, error) for call in list(self._waiting)])

    def reload(self) -> None:
        """Load everything again, into an engine that has been started anew. What cannot be is forgotten."""
        for name, path in self._paths.items():
            self._reloading[self._next_call] = name
            self._send(LoadAdapter(self._next_call, name, path))
            self._next_call += 1

    async def _ask(self, message: Callable[[int], ToEngine]) -> None:
        call, self._next_call = self._next_call, self._next_call + 1
        future: asyncio.Future[ErrorInfo | None] = asyncio.get_running_loop().create_future()
        self._waiting[call] = future
        self._send(message(call))
        error = await future
        if error is not None:
            raise error_from_code(error.code, error.message, param=error.param, retry_after_s=error.retry_after_s)
