"""How everything outside an engine talks to it."""

from collections.abc import AsyncGenerator
from typing import Protocol

from penstock.protocol.generate import GenerateRequest, TokenDelta
from penstock.protocol.status import EngineStatus, ModelInfo


class EngineClient(Protocol):
    """An engine, in this process or in another.

    All methods belong to one event loop. The life is ``start`` -> ``generate``... -> ``drain`` -> ``stop``.
    """

    async def start(self) -> None:
        """Load the model; returns when the engine takes requests.

        Raises ``ConfigError`` when the engine cannot start as configured.
        """

    def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenDelta, None]:
        """Yield the deltas of all choices as they come; ends after each choice has finished.

        Closing the iterator early aborts the request and frees its blocks within one step.
        Raises ``RequestError`` or ``UnavailableError`` before the first delta, ``InternalError`` at any time.
        """

    def status(self) -> EngineStatus:
        """Return the engine's latest word about itself; never blocks."""

    def model(self) -> ModelInfo:
        """Return what is served. Raises ``NotReady`` before the engine has loaded once."""

    async def load_adapter(self, name: str, path: str) -> None:
        """Load the LoRA adapter in directory ``path``; requests may name it from then on.

        Raises ``RequestError`` if it cannot be loaded, if ``name`` is taken or if there is no room.
        """

    async def unload_adapter(self, name: str) -> None:
        """Take no more requests for an adapter; those that run go on. Raises ``ModelNotFound``."""

    def adapters(self) -> tuple[str, ...]:
        """Return the names of the loaded adapters."""

    async def drain(self, timeout_s: float) -> bool:
        """Refuse new requests and wait for the running ones; False when some were left at the timeout."""

    async def stop(self) -> None:
        """Abort what runs and free everything. Safe to call twice."""
