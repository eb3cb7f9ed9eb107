"""An evaluation on paper: each form beside the others."""

import json
from collections.abc import Sequence
from pathlib import Path

from penstock.errors import InvalidSetting
from penstock.eval.report.card import model_card
from penstock.eval.report.page import html_page
from penstock.eval.report.plots import require_plots
from penstock.eval.report.points import Point, read_points
from penstock.eval.report.table import format_report
from penstock.eval.result import EvalReport

__all__ = ["Point", "format_report", "html_page", "model_card", "prepare_directory", "read_points", "write_reports"]


def prepare_directory(directory: Path) -> None:
    """Make the directory that reports will be written to. Raises ``MissingExtra`` or ``InvalidSetting`` if none can."""
    require_plots()
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidSetting(
            f"reports cannot be written to {directory}: {error.strerror}; choose another --out"
        ) from error


def write_reports(
    report: EvalReport, directory: Path, *, beside: Sequence[Point] = (), loss_bound: float | None = None
) -> list[Path]:
    """Write report.json, report.html and model-card.md to ``directory``; return where they are.

    Raises ``MissingExtra`` without matplotlib.
    """
    texts = {
        "report.json": json.dumps(report.to_json(), indent=2) + "\n",
        "report.html": html_page(report, beside, loss_bound=loss_bound),
        "model-card.md": model_card(report),
    }
    for name, text in texts.items():
        (directory / name).write_text(text, encoding="utf-8")
    return [directory / name for name in texts]
