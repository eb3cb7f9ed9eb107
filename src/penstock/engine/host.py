"""The inside of an engine loop: messages in, one message a step out. Thread and process hosts share it."""

from typing import Protocol

from penstock.engine.engine import error_info
from penstock.engine.messages import Abort, Loaded, Stepped, Submit, ToEngine
from penstock.errors import PenstockError
from penstock.protocol import EngineStatus, GenerateRequest, ModelInfo, TokenDelta


class SteppedEngine(Protocol):
    """The part of an engine that its loop uses; see ``Engine``."""

    model: ModelInfo

    @property
    def has_work(self) -> bool:
        """Whether ``step`` would do something."""

    def add(self, request: GenerateRequest) -> None:
        """Queue a request."""

    def abort(self, request_id: str) -> None:
        """End a request at once."""

    def step(self) -> list[TokenDelta]:
        """Run one step and return what it added to each choice."""

    def status(self) -> EngineStatus:
        """Return the engine's state at this moment."""


class EngineHost:
    """An engine and the deltas that have not been sent yet."""

    def __init__(self, engine: SteppedEngine) -> None:
        self._engine = engine
        self._refusals: list[TokenDelta] = []
        self._has_aborted = False
        """Since the last step: what that freed has to be told even where no step is left to do."""

    @property
    def has_work(self) -> bool:
        """Whether ``step`` has something to do or to say."""
        return bool(self._refusals) or self._has_aborted or self._engine.has_work

    def loaded(self) -> Loaded:
        """Return the message that says the engine takes requests."""
        return Loaded(self._engine.model, self._engine.status())

    def handle(self, message: ToEngine) -> None:
        """Take a message in. A request that is refused is answered with the next step."""
        match message:
            case Submit(request):
                try:
                    self._engine.add(request)
                except PenstockError as error:
                    self._refusals.append(
                        TokenDelta(request_id=request.request_id, finish_reason="error", error=error_info(error))
                    )
            case Abort(request_id):
                self._engine.abort(request_id)
                self._has_aborted = True

    def step(self) -> Stepped:
        """Run one step and return all there is to say."""
        refusals, self._refusals = self._refusals, []
        self._has_aborted = False
        deltas = refusals + self._engine.step() if self._engine.has_work else refusals
        return Stepped(deltas, self._engine.status())
