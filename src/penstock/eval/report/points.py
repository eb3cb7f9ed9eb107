"""What a Pareto plot shows: models by size, speed and loss, of this report and of earlier ones beside it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from penstock.errors import InvalidSetting
from penstock.eval.files import read_text
from penstock.eval.result import EvalReport


@dataclass(frozen=True, slots=True)
class Point:
    """A model, as it was run."""

    label: str
    weights_bytes: int
    loss: float
    tokens_per_s: float | None
    """None where speed was not measured"""


class _Value(msgspec.Struct):
    value: float


class _Figure(msgspec.Struct):
    candidate: _Value
    reference: _Value | None


class _Task(msgspec.Struct):
    kind: str
    data_sha256: str
    figures: list[_Figure]


class _Side(msgspec.Struct):
    label: str
    weights_bytes: int


class _Median(msgspec.Struct):
    median: float


class _Pace(msgspec.Struct):
    tokens_per_s: _Median


class _Speed(msgspec.Struct):
    candidate: _Pace
    reference: _Pace | None


class _Conditions(msgspec.Struct):
    limit: int | None


class _Report(msgspec.Struct):
    """What is read of a report.json."""

    conditions: _Conditions
    candidate: _Side
    reference: _Side | None
    tasks: list[_Task]
    speed: _Speed | None


def points_of(report: EvalReport) -> list[Point]:
    """Return the models of ``report``, if it has a text."""
    return _points(msgspec.convert(report.to_json(), _Report))


def read_points(file: Path, *, data_sha256: str, limit: int | None) -> list[Point]:
    """Return the models of an earlier report.json, whose text and limit have to be these.

    Raises ``InvalidSetting`` if they are not, or it is none.
    """
    try:
        report = msgspec.json.decode(read_text(file), type=_Report)
    except msgspec.DecodeError as error:
        raise InvalidSetting(f"{file} is no report.json of penstock eval: {error}") from error
    text = _text(report)
    if text is None or text.data_sha256 != data_sha256 or report.conditions.limit != limit:
        raise InvalidSetting(
            f"{file} is of another text, window, Python or --limit than this evaluation, so losses cannot stand beside "
            "each other; make it again with the same ones, or leave --beside out"
        )
    return _points(report)


def frontier(points: Sequence[Point]) -> list[Point]:
    """Return the points that no other is both smaller and better than, smallest first."""
    kept: list[Point] = []
    for point in sorted(points, key=lambda one: (one.weights_bytes, one.loss)):
        if not kept or point.loss < kept[-1].loss:
            kept.append(point)
    return kept


def _text(report: _Report) -> _Task | None:
    return next((task for task in report.tasks if task.kind == "perplexity"), None)


def _points(report: _Report) -> list[Point]:
    task = _text(report)
    if task is None:
        return []
    loss, speed = task.figures[0], report.speed
    points = [
        Point(
            report.candidate.label,
            report.candidate.weights_bytes,
            loss.candidate.value,
            speed.candidate.tokens_per_s.median if speed else None,
        )
    ]
    if report.reference is not None and loss.reference is not None:
        pace = speed.reference if speed else None
        rate = pace.tokens_per_s.median if pace else None
        points.append(Point(report.reference.label, report.reference.weights_bytes, loss.reference.value, rate))
    return points
