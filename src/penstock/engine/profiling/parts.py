"""Wrappers around an engine, its runner and its model, which mark where one part of a step ends."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from penstock.engine.host import SteppedEngine
from penstock.engine.profiling.recorder import Recorder
from penstock.engine.runner.base import Runner, StepResult
from penstock.engine.runner.cpu import RunnableModel
from penstock.engine.scheduler import ScheduledBatch
from penstock.kernels import BatchLayout, KVBlocks
from penstock.models.lora import Adapted, Adapter
from penstock.models.vision import Inserted
from penstock.protocol import EngineStatus, GenerateRequest, Picture, SamplingParams, TokenDelta

if TYPE_CHECKING:
    from llguidance import LLMatcher


def around_engine(engine: SteppedEngine, recorder: Recorder) -> SteppedEngine:
    """Return ``engine`` with its steps' borders marked."""
    return _Engine(engine, recorder)


def around_runner(runner: Runner, recorder: Recorder) -> Runner:
    """Return ``runner``, marking where scheduling ends and where sampling does."""
    return _Runner(runner, recorder)


def around_model(model: RunnableModel, recorder: Recorder) -> RunnableModel:
    """Return ``model`` with its borders marked."""
    return _Model(model, recorder)


class _Engine:
    def __init__(self, engine: SteppedEngine, recorder: Recorder) -> None:
        self.model = engine.model
        self.grammars = engine.grammars
        self._engine = engine
        self._recorder = recorder
        self._left_work = False

    @property
    def has_work(self) -> bool:
        return self._engine.has_work

    def add(self, request: GenerateRequest, matcher: "LLMatcher | None" = None) -> None:
        self._engine.add(request, matcher)

    def load_adapter(self, name: str, path: Path) -> None:
        self._engine.load_adapter(name, path)

    def unload_adapter(self, name: str) -> None:
        self._engine.unload_adapter(name)

    def abort(self, request_id: str) -> None:
        self._engine.abort(request_id)

    def step(self) -> list[TokenDelta]:
        self._recorder.begin_step(is_next=self._left_work)
        deltas = self._engine.step()
        self._recorder.end_step()
        self._left_work = self._engine.has_work
        return deltas

    def on_news(self, wake: Callable[[], object]) -> None:
        self._engine.on_news(wake)

    def close(self) -> None:
        self._engine.close()

    def status(self) -> EngineStatus:
        return self._engine.status()


class _Runner:
    def __init__(self, runner: Runner, recorder: Recorder) -> None:
        self._runner = runner
        self._recorder = recorder

    def add(
        self,
        sequence_id: int,
        index: int,
        params: SamplingParams,
        prompt_token_ids: Sequence[int],
        matcher: "LLMatcher | None" = None,
        adapter: object | None = None,
        pictures: Sequence[Picture] = (),
    ) -> None:
        self._runner.add(sequence_id, index, params, prompt_token_ids, matcher, adapter, pictures)

    def load_adapter(self, path: Path) -> object:
        return self._runner.load_adapter(path)

    def remove(self, sequence_id: int) -> None:
        self._runner.remove(sequence_id)

    def commit(self, sequence_id: int, token_id: int) -> bool:
        return self._runner.commit(sequence_id, token_id)

    def matcher(self, sequence_id: int) -> "LLMatcher | None":
        return self._runner.matcher(sequence_id)

    def num_possible(self, sequence_id: int, draft: Sequence[int]) -> int:
        return self._runner.num_possible(sequence_id, draft)

    def execute(self, batch: ScheduledBatch) -> StepResult:
        self._recorder.lap("schedule")
        result = self._runner.execute(batch)
        self._recorder.lap("sampling")
        return result


class _Model:
    def __init__(self, model: RunnableModel, recorder: Recorder) -> None:
        self._model = model
        self._recorder = recorder

    def load_adapter(self, path: Path) -> Adapter:
        return self._model.load_adapter(path)

    def forward(
        self,
        token_ids: Tensor,
        layout: BatchLayout,
        cache: list[KVBlocks],
        adapted: Adapted = (),
        inserted: Inserted | None = None,
    ) -> Tensor:
        self._recorder.count(len(token_ids), len(layout.query_lens_list))
        self._recorder.lap("inputs")
        hidden = self._model.forward(token_ids, layout, cache, adapted, inserted)
        self._recorder.lap("between ops")
        return hidden

    def replay(self, cache: list[KVBlocks], block_size: int) -> None:
        """Return nothing: what is repeated in one call has no parts to be timed."""

    def logits(self, hidden: Tensor) -> Tensor:
        logits = self._model.logits(hidden)
        self._recorder.lap("between ops")
        return logits
