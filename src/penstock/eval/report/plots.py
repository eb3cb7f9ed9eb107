"""An evaluation's plots, as SVG for a page to hold."""

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import StringIO
from typing import TYPE_CHECKING, Any

from penstock.errors import MissingExtra
from penstock.eval.report.points import Point, frontier
from penstock.eval.report.words import LABELS
from penstock.eval.result import Figure, TaskReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_OURS = "tab:blue"


def require_plots() -> None:
    """Raise MissingExtra where matplotlib is not installed: better before a long evaluation than after it."""
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingExtra("--out draws plots with matplotlib, which is not installed; pip install 'penstock[plots]'")


def pareto_svg(points: Sequence[Point], num_own: int) -> str:
    """Return loss over size, and over speed where it was measured; the first ``num_own``, filled, are this report's."""
    styles: list[dict[str, Any]] = [
        {"color": f"C{i}", "mfc": f"C{i}" if i < num_own else "none"} for i in range(len(points))
    ]
    timed = [i for i, point in enumerate(points) if point.tokens_per_s is not None]
    with _figure(2 if timed else 1, height=4.2) as (axes, out):
        sizes = [point.weights_bytes / 2**20 for point in points]
        _scatter(axes[0], points, sizes, styles, "weights in memory, MiB")
        best = frontier(points)
        line = [one.weights_bytes / 2**20 for one in best], [one.loss for one in best]
        axes[0].plot(*line, color="gray", lw=1, ls="--")
        axes[0].set_title("smaller and better is lower left")
        if timed:
            rates = [points[i].tokens_per_s for i in timed]
            _scatter(axes[1], [points[i] for i in timed], rates, [styles[i] for i in timed], "tokens/s of one answer")
            axes[1].set_title("faster and better is lower right")
    return out[0]


def layers_svg(errors: Sequence[float]) -> str:
    """Return the relative error of hidden states after each layer; the last bar is of the final ones."""
    names = [*(str(i) for i in range(len(errors) - 1)), "final"]
    with _figure(1, height=3.2) as (axes, out):
        axes[0].bar(names, errors, color=_OURS)
        axes[0].set(xlabel="layer", ylabel="relative error", title="hidden states after each layer")
        axes[0].set_xticks(range(0, len(names), max(1, len(names) // 16)))
        axes[0].grid(axis="y", alpha=0.3)
    return out[0]


def differences_svg(tasks: Sequence[TaskReport], loss_bound: float | None) -> str:
    """Return each task's first difference and interval, in percent of a loss and in points of a score."""
    rows = [(task.name, task.figures[0]) for task in tasks]
    bound = "" if loss_bound is None else "; dashed: the most that a loss may rise"
    with _figure(1, height=1.4 + 0.4 * len(rows)) as (axes, out):
        for row, (_, figure) in enumerate(rows):
            found = figure.increase or figure.difference
            assert found is not None
            if found.low is not None and found.high is not None:
                axes[0].plot([100 * found.low, 100 * found.high], [row, row], color=_OURS, lw=2)
            axes[0].plot([100 * found.value], [row], "o", color=_OURS)
        axes[0].axvline(0, color="black", lw=0.8)
        if loss_bound is not None:
            axes[0].axvline(100 * loss_bound, color="tab:red", lw=1, ls="--")
        axes[0].set_yticks(range(len(rows)), [f"{name}: {_unit(figure)}" for name, figure in rows])
        axes[0].set(ylim=(len(rows) - 0.5, -0.5), xlabel=f"candidate minus reference{bound}")
        axes[0].set_title("differences, 95% intervals")
        axes[0].grid(axis="x", alpha=0.3)
    return out[0]


def _unit(figure: Figure) -> str:
    return f"{LABELS[figure.name].partition(',')[0]}, {'%' if figure.increase is not None else 'points'}"


def _scatter(
    axes: "Axes", points: Sequence[Point], x: Sequence[Any], styles: Sequence[dict[str, Any]], label: str
) -> None:
    for point, at, style in zip(points, x, styles, strict=True):
        axes.plot([at], [point.loss], "o", ms=8, label=point.label, **style)
    axes.set(xlabel=label, ylabel="loss, nats per token")
    axes.margins(x=0.1, y=0.15)
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)


@contextmanager
def _figure(num_panels: int, *, height: float) -> Iterator[tuple[Sequence["Axes"], list[str]]]:
    """Yield axes to draw on and a list that holds the SVG afterwards."""
    require_plots()
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    out: list[str] = []
    # Names may hold a $, which is no formula; text stays text, so that it can be searched.
    with pyplot.rc_context({"text.parse_math": False, "svg.fonttype": "none", "svg.hashsalt": "penstock"}):
        figure, grid = pyplot.subplots(1, num_panels, figsize=(5.6 * num_panels, height), squeeze=False)
        try:
            yield list(grid[0]), out
            figure.tight_layout()
            text = StringIO()
            figure.savefig(text, format="svg", metadata={"Date": None})
            svg = text.getvalue()
            out.append(svg[svg.index("<svg") :])
        finally:
            pyplot.close(figure)
