"""The inside of an engine loop: messages in, one message a step out. Thread and process hosts share it."""

from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from penstock.engine.messages import (
    Abort,
    Answer,
    LoadAdapter,
    Loaded,
    Stepped,
    Submit,
    ToEngine,
    UnloadAdapter,
    error_info,
)
from penstock.errors import PenstockError
from penstock.protocol import EngineStatus, GenerateRequest, ModelInfo, TokenDelta
from penstock.text.grammar import GrammarCompiler, compile_thread

if TYPE_CHECKING:
    from llguidance import LLMatcher


class SteppedEngine(Protocol):
    """The part of an engine that its loop uses; see ``Engine``."""

    model: ModelInfo
    grammars: GrammarCompiler

    @property
    def has_work(self) -> bool:
        """Whether ``step`` would do something."""

    def add(self, request: GenerateRequest, matcher: "LLMatcher | None" = None) -> None:
        """Queue a request; ``matcher`` stands at the beginning of its grammar, if it has one."""

    def abort(self, request_id: str) -> None:
        """End a request at once."""

    def load_adapter(self, name: str, path: Path) -> None:
        """Load a LoRA adapter."""

    def unload_adapter(self, name: str) -> None:
        """Forget a LoRA adapter."""

    def step(self) -> list[TokenDelta]:
        """Run one step and return what it added to each choice."""

    def on_news(self, wake: Callable[[], object]) -> None:
        """Have ``wake`` called, on any thread, when ``has_work`` may have become true by itself."""

    def close(self) -> None:
        """End the processes that belong to it."""

    def status(self) -> EngineStatus:
        """Return the engine's state at this moment."""


class EngineHost:
    """An engine, the requests whose grammar is being compiled and the deltas that have not been sent yet."""

    def __init__(self, engine: SteppedEngine, wake: Callable[[], object]) -> None:
        """``wake`` is called on another thread when ``has_work`` may have become true."""
        self._engine = engine
        self._wake = wake
        engine.on_news(wake)
        self._compile_thread = compile_thread()
        self._compiling: dict[str, tuple[GenerateRequest, Future[LLMatcher]]] = {}
        self._refusals: list[TokenDelta] = []
        self._has_aborted = False
        """Since the last step: what that freed has to be told even where no step is left to do."""
        self._answers: list[Answer] = []

    @property
    def has_work(self) -> bool:
        """Whether ``step`` has something to do or to say."""
        if self._refusals or self._answers or self._has_aborted or self._engine.has_work:
            return True
        return any(matcher.done() for _, matcher in self._compiling.values())

    def loaded(self) -> Loaded:
        """Return the message that says the engine takes requests."""
        return Loaded(self._engine.model, self._engine.status())

    def close(self) -> None:
        """End the processes that belong to the engine."""
        self._engine.close()

    def handle(self, message: ToEngine) -> None:
        """Take a message in. A request that is refused is answered with the next step."""
        match message:
            case Submit(request):
                grammar = request.sampling.grammar
                if grammar is None:
                    self._add(request, None)
                else:
                    # On another thread, so that nobody's next token waits for it.
                    matcher = self._compile_thread.submit(self._engine.grammars.compile, grammar)
                    self._compiling[request.request_id] = (request, matcher)
                    matcher.add_done_callback(lambda _: self._wake())
            case Abort(request_id):
                self._compiling.pop(request_id, None)
                self._engine.abort(request_id)
                self._has_aborted = True
            case LoadAdapter(call, name, path):
                self._answer(call, lambda: self._engine.load_adapter(name, Path(path)))
            case UnloadAdapter(call, name):
                self._answer(call, lambda: self._engine.unload_adapter(name))

    def _add(self, request: GenerateRequest, compiled: "Future[LLMatcher] | None") -> None:
        try:
            self._engine.add(request, None if compiled is None else compiled.result())
        except PenstockError as error:
            self._refusals.append(
                TokenDelta(request_id=request.request_id, finish_reason="error", error=error_info(error))
            )

    def step(self) -> Stepped:
        """Run one step and return all there is to say."""
        if self._compiling:
            for request_id, (request, matcher) in list(self._compiling.items()):
                if matcher.done():
                    del self._compiling[request_id]
                    self._add(request, matcher)
        refusals, self._refusals = self._refusals, []
        self._has_aborted = False
        answers, self._answers = self._answers, []
        deltas = refusals + self._engine.step() if self._engine.has_work else refusals
        return Stepped(deltas, self._engine.status(), answers)

    def _answer(self, call: int, work: Callable[[], None]) -> None:
        try:
            work()
        except PenstockError as error:
            self._answers.append(Answer(call, error_info(error)))
        else:
            self._answers.append(Answer(call))
