"""Judge a model: how well it does, how far it is from another, and whether that is near enough.

A ``Subject`` is a model behind an engine, asked as it is served; ``run_tasks`` examines it. ``closeness`` and
``perplexity`` take loaded models without an engine. ``judge`` holds what was found against thresholds.
"""

from penstock.eval.catalogue import load_tasks
from penstock.eval.compare import (
    OnTask,
    report_closeness,
    report_tasks,
    require_same_windows,
    run_tasks,
    side_of,
)
from penstock.eval.forward import Closeness, closeness, perplexity, window_nats
from penstock.eval.prefix_reuse import PrefixReuse, prefix_reuse
from penstock.eval.result import EvalReport, Side, SpeedReport, TaskReport
from penstock.eval.sets import BUILT_IN, built_in_task, held_out_text
from penstock.eval.speed import measure_speed
from penstock.eval.statistics import Estimate
from penstock.eval.subject import Subject
from penstock.eval.tasks import PerplexityTask, Task
from penstock.eval.verdict import DEFAULT_THRESHOLDS, Thresholds, judge
from penstock.eval.windows import DEFAULT_WINDOW, TextWindows, cut_windows

__all__ = [
    "BUILT_IN",
    "DEFAULT_THRESHOLDS",
    "DEFAULT_WINDOW",
    "Closeness",
    "Estimate",
    "EvalReport",
    "OnTask",
    "PerplexityTask",
    "PrefixReuse",
    "Side",
    "SpeedReport",
    "Subject",
    "Task",
    "TaskReport",
    "TextWindows",
    "Thresholds",
    "built_in_task",
    "closeness",
    "cut_windows",
    "held_out_text",
    "judge",
    "load_tasks",
    "measure_speed",
    "perplexity",
    "prefix_reuse",
    "report_closeness",
    "report_tasks",
    "require_same_windows",
    "run_tasks",
    "side_of",
    "window_nats",
]
