"""How a model was made and what was measured of it, as files say it."""

import json
from pathlib import Path
from typing import Any

import msgspec

from penstock.errors import InvalidSetting

MADE_BY = "compression.json"
"""What `penstock compress` leaves beside the weights: recipe, layout, and what was compressed and watched"""


class _Value(msgspec.Struct):
    value: float


class _Figure(msgspec.Struct):
    name: str
    candidate: _Value


class _Task(msgspec.Struct):
    name: str
    figures: list[_Figure]


class _Report(msgspec.Struct):
    tasks: list[_Task]


def read_recipe(path: Path | None, model: Path) -> str | None:
    """Return the text of ``path``, else of what `penstock compress` left in ``model``, if anything.

    Raises ``InvalidSetting``.
    """
    if path is None:
        path = model / MADE_BY
        if not path.is_file():
            return None
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise InvalidSetting(f"the recipe {path} cannot be read as text: {error}") from error


def read_metrics(path: Path) -> dict[str, Any]:
    """Return a file's object, a report of `penstock eval` or numbers by name. Raises ``InvalidSetting`` without one."""
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidSetting(f"the metrics {path} cannot be read: {error}") from error
    if not isinstance(metrics, dict):
        raise InvalidSetting(f"{path} holds no JSON object; give what penstock eval --json prints, or numbers by name")
    return metrics


def figures(metrics: dict[str, Any]) -> dict[str, float]:
    """Return the numbers to show: a report's figures of the candidate by task and name, or an object's own numbers."""
    try:
        report = msgspec.convert(metrics, _Report)
    except msgspec.ValidationError:
        return {name: value for name, value in metrics.items() if isinstance(value, int | float)}
    return {f"{task.name} {figure.name}": figure.candidate.value for task in report.tasks for figure in task.figures}
