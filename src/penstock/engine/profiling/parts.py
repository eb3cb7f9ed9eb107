"""Wrappers around an engine, its runner and its model, which mark where one part of a step ends."""

from torch import Tensor

from penstock.engine.host import SteppedEngine
from penstock.engine.profiling.recorder import Recorder
from penstock.engine.runner.base import Runner
from penstock.engine.runner.cpu import RunnableModel
from penstock.kernels import BatchLayout, KVBlocks
from penstock.models.lora import Adapted
from penstock.models.vision import Inserted
from penstock.protocol import TokenDelta


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
        self.add = engine.add
        self.abort = engine.abort
        self.load_adapter = engine.load_adapter
        self.unload_adapter = engine.unload_adapter
        self.on_news = engine.on_news
        self.close = engine.close
        self.status = engine.status
        self._engine = engine
        self._recorder = recorder
        self._left_work = False

    @property
    def has_work(self) -> bool:
        return self._engine.has_work

    def step(self) -> list[TokenDelta]:
        self._recorder.begin_step(is_next=self._left_work)
        deltas = self._engine.step()
        self._recorder.end_step()
        self._left_work = self._engine.has_work
        return deltas


class _Runner:
    def __init__(self, runner: Runner, recorder: Recorder) -> None:
        self.add = runner.add
        self.load_adapter = runner.load_adapter
        self.remove = runner.remove
        self.commit = runner.commit
        self.matcher = runner.matcher
        self.num_possible = runner.num_possible
        self.execute = recorder.timed("sampling", runner.execute, before="schedule")


class _Model:
    def __init__(self, model: RunnableModel, recorder: Recorder) -> None:
        self.load_adapter = model.load_adapter
        self._model = model
        self._recorder = recorder

    def forward(
        self,
        token_ids: Tensor,
        layout: BatchLayout,
        cache: list[KVBlocks],
        adapted: Adapted = (),
        inserted: Inserted | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        self._recorder.count(len(token_ids), len(layout.query_lens_list))
        self._recorder.lap("inputs")
        hidden = self._model.forward(token_ids, layout, cache, adapted, inserted, rows)
        self._recorder.lap("between ops")
        return hidden

    def replay(self, cache: list[KVBlocks], block_size: int) -> None:
        """Return nothing: what is repeated in one call has no parts to be timed."""

    def logits(self, hidden: Tensor) -> Tensor:
        logits = self._model.logits(hidden)
        self._recorder.lap("between ops")
        return logits
