"""Medians with their spread, ratios of pairs, as tables and a picture."""

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.peers.turns import System
from benchmarks.peers.workloads import LOADS, Figure

BESIDE = (
    ("INT4", ("llama.cpp Q4_0", "openvino INT4", "onnxruntime INT4")),
    ("INT8", ("llama.cpp Q8_0", "openvino INT8", "vllm W8A8")),
    ("BF16", ("llama.cpp BF16", "vllm BF16", "transformers BF16")),
)
"""What each precision of Penstock, by how its name begins, is compared with."""


@dataclass(frozen=True, slots=True)
class Row:
    """One figure of every system, round by round."""

    label: str
    less_is_better: bool
    values: dict[str, list[float]]
    """By system's name; systems without the figure are left out."""


def rows(systems: Sequence[System]) -> list[Row]:
    """Return every figure that was measured, in the order of the loads."""
    measured = [system for system in systems if system.turns or system.cold_start_s]
    found = [_load_row(load, figure, measured) for load in LOADS for figure in LOADS[load].figures]
    found.append(Row("cold start to a token, s", True, {system.name: system.cold_start_s for system in measured}))
    memory = {system.name: [system.peak_memory_bytes / 1e9] for system in measured if system.peak_memory_bytes}
    found.append(Row("peak memory, GB", True, memory))
    return [row for row in found if any(row.values.values())]


def _load_row(load: str, figure: Figure, systems: Sequence[System]) -> Row:
    values = {
        system.name: [figure.get(turn.report) for turn in system.turns if turn.load == load] for system in systems
    }
    return Row(figure.label, figure.less_is_better, {name: found for name, found in values.items() if found})


@dataclass(frozen=True, slots=True)
class Ratio:
    """One figure of Penstock over a peer's, for each round; above 1 is better for Penstock, whatever the figure."""

    ours: str
    theirs: str
    label: str
    rounds: list[float]

    @property
    def median(self) -> float:
        """The median of all rounds."""
        return statistics.median(self.rounds)


def ratios(table: Sequence[Row]) -> list[Ratio]:
    """Return how Penstock's precisions compare with the peers' of the same width, each round with its own pair."""
    return [
        Ratio(
            ours,
            theirs,
            row.label,
            [
                their / mine if row.less_is_better else mine / their
                for mine, their in zip(row.values[ours], row.values[theirs], strict=False)
            ],
        )
        for ours, theirs in _pairs(table)
        for row in table
        if row.values.get(ours) and row.values.get(theirs)
    ]


def _pairs(table: Sequence[Row]) -> Iterator[tuple[str, str]]:
    names = list(dict.fromkeys(name for row in table for name in row.values))
    for ours in (name for name in names if name.startswith("penstock ")):
        for width, theirs in BESIDE:
            if ours.removeprefix("penstock ").startswith(width):
                yield from ((ours, name) for name in theirs if name in names)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return the median, least and most of ``values``; nothing of nothing."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)} if values else {}


def markdown(systems: Sequence[System], conditions: Mapping[str, Any]) -> str:
    """Return the conditions, the figures, the ratios, what was not measured and why, and how each was installed."""
    table = rows(systems)
    names = list(dict.fromkeys(name for row in table for name in row.values))
    lines = [f"# {conditions['model']['shape']} beside peers, {conditions['date'][:10]}", ""]
    lines += ["```", json.dumps({**conditions, "model": conditions["model"]["shape"]}, indent=1), "```", ""]
    lines += ["Median (least..most) of the rounds.", ""]
    lines += markdown_table(
        ["", *names], [[row.label, *(_spread(row.values.get(name, [])) for name in names)] for row in table]
    )
    compared = ratios(table)
    pairs = list(dict.fromkeys((ratio.ours, ratio.theirs) for ratio in compared))
    by_cell = {(ratio.label, ratio.ours, ratio.theirs): ratio for ratio in compared}
    lines += [
        "",
        "Penstock to the peer, the median of each round's ratio (least..most); above 1 Penstock is better.",
        "",
    ]
    body = [
        [row.label, *(_spread(by_cell[key].rounds if (key := (row.label, *pair)) in by_cell else []) for pair in pairs)]
        for row in table
    ]
    lines += markdown_table(["", *(f"{ours} / {theirs}" for ours, theirs in pairs)], body)
    failures = [[system.name, system.failure] for system in systems if system.failure is not None]
    if failures:
        lines += ["", "Not measured, or not to the end:", "", *markdown_table(["system", "reason"], failures)]
    lines += ["", "Versions and how each was installed:", ""]
    installs = {system.peer.name: (system.version or "-", system.peer.install) for system in systems}
    lines += markdown_table(
        ["system", "version", "install"],
        [[name, version, "; ".join(f"`{line}`" for line in how) or "-"] for name, (version, how) in installs.items()],
    )
    return "\n".join(lines) + "\n"


def markdown_table(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table."""
    cells = [head, ["---"] * len(head), *body]
    return [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in cells]


def _spread(values: Sequence[float]) -> str:
    if not values:
        return "-"
    median = f"{statistics.median(values):.3g}"
    return median if len(values) == 1 else f"{median} ({min(values):.3g}..{max(values):.3g})"


def write_plot(file: Path, systems: Sequence[System], title: str) -> None:
    """Draw every figure as bars, a dot for each round."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    table = rows(systems)
    names = list(dict.fromkeys(name for row in table for name in row.values))[::-1]
    columns = 3
    lines = -(-len(table) // columns)
    figure, panels = pyplot.subplots(
        lines, columns, figsize=(15, lines * (0.8 + 0.28 * len(names))), layout="constrained", squeeze=False
    )
    figure.suptitle(title)
    for axes, row in zip(panels.flat, table, strict=False):
        for position, name in enumerate(names):
            values = row.values.get(name)
            if values:
                color = "tab:blue" if name.startswith("penstock ") else "tab:gray"
                axes.barh(position, statistics.median(values), color=color, alpha=0.7)
                axes.plot(values, [position] * len(values), ".", color="black", ms=4)
        axes.set_yticks(range(len(names)), names)
        axes.set_title(f"{row.label}{' (less is better)' * row.less_is_better}", fontsize=10)
        axes.grid(axis="x", alpha=0.3)
    for axes in list(panels.flat)[len(table) :]:
        axes.axis("off")
    figure.savefig(file, dpi=110)
    pyplot.close(figure)
