"""Where an engine's steps spend their time: wrappers around its parts, put there only when somebody asks."""

from penstock.engine.host import SteppedEngine
from penstock.engine.profiling.ops import around_ops
from penstock.engine.profiling.parts import around_engine, around_model, around_runner
from penstock.engine.profiling.recorder import ProfiledStep, Recorder, Span
from penstock.engine.runner.base import Runner
from penstock.engine.runner.cpu import RunnableModel
from penstock.kernels import Ops, Quantization
from penstock.models import ModelConfig

__all__ = ["ProfiledStep", "Profiler", "Span"]


class Profiler:
    """Records every step of the one engine whose parts it was put around.

    A step's parts are: schedule, inputs, the model's ops and what lies between them, sampling, output (committing
    tokens and making text of them), and between steps (messages), where there was work all the while.
    """

    def __init__(self) -> None:
        self._recorder = Recorder()

    @property
    def steps(self) -> list[ProfiledStep]:
        """The steps so far."""
        return self._recorder.steps

    def clear(self) -> None:
        """Forget the steps so far. For when the engine is idle."""
        self._recorder.steps = []

    def around_ops(self, ops: Ops, config: ModelConfig, *, quantization: Quantization | None = None) -> Ops:
        """Return ``ops`` that are timed and keep weights as ``quantization`` says."""
        return around_ops(ops, config, quantization, self._recorder)

    def around_model(self, model: RunnableModel) -> RunnableModel:
        """Return ``model`` with its borders marked."""
        return around_model(model, self._recorder)

    def around_runner(self, runner: Runner) -> Runner:
        """Return ``runner`` with its borders marked."""
        return around_runner(runner, self._recorder)

    def around_engine(self, engine: SteppedEngine) -> SteppedEngine:
        """Return ``engine`` with its steps' borders marked."""
        return around_engine(engine, self._recorder)
