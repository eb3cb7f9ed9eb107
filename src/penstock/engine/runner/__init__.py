"""Running a scheduled batch through a model. Each device is a sibling module behind one interface."""

from penstock.engine.runner.base import Runner, StepResult
from penstock.engine.runner.cpu import CPURunner

__all__ = ["CPURunner", "Runner", "StepResult"]
