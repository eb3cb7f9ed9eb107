"""Draw what a table cannot show: whole distributions, and how a run went over time."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from penstock.bench.load import Outcome, Run
from penstock.errors import MissingExtra

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def require_plots() -> None:
    """Raise MissingExtra where matplotlib is not installed: better before a long run than after it."""
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingExtra("plots need matplotlib, which is not installed; pip install 'penstock[plots]'")


def write_plot(file: Path, title: str, runs: Sequence[Run]) -> None:
    """Write a picture of all ``runs`` to ``file``; its suffix chooses the format.

    Three panels: the share of requests whose first token, and of gaps that, came within a time; and when each
    request started and ended in the last run. Raises MissingExtra where matplotlib is not installed.
    """
    require_plots()
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    whole = [outcome for run in runs for outcome in run.outcomes if outcome.error is None]
    figure, (first, between, flow) = pyplot.subplots(1, 3, figsize=(15, 4.5), layout="constrained")
    figure.suptitle(title)
    _draw_share(first, [outcome.ttft_s for outcome in whole if outcome.ttft_s is not None], "time to first token")
    _draw_share(between, [gap_s for outcome in whole for gap_s in outcome.gaps_s], "inter-token latency")
    _draw_flow(flow, runs[-1].outcomes)
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def _draw_share(axes: "Axes", values_s: Sequence[float], label: str) -> None:
    ordered = sorted(values_s)
    axes.plot(ordered, [(rank + 1) / len(ordered) for rank in range(len(ordered))], drawstyle="steps-post")
    axes.set(title=label, xlabel="seconds", ylabel="share", ylim=(0, 1), xlim=(0, None))
    axes.grid(alpha=0.3)


def _draw_flow(axes: "Axes", outcomes: Sequence[Outcome]) -> None:
    for row, outcome in enumerate(outcomes):
        whole = outcome.error is None
        axes.plot([outcome.due_s, outcome.finished_s], [row, row], color="tab:blue" if whole else "tab:red", lw=1)
        if outcome.piece_s:
            axes.plot([outcome.piece_s[0]], [row], ".", color="black", ms=3)
    axes.set(title="each request; a dot is its first token", xlabel="seconds", ylabel="request")
