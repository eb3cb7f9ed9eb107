"""One table of all results beside peers.

    python -m benchmarks.peers.index

writes `benchmarks/results/README.md` from the JSON of each run beside it.
"""

import json
import statistics
from collections.abc import Mapping
from itertools import groupby
from typing import Any

from benchmarks.peers.peer import REPOSITORY
from benchmarks.peers.report import markdown_table

RESULTS = REPOSITORY / "benchmarks/results"
INDEX = RESULTS / "README.md"

_COLUMNS = {
    "(a) tokens/s": "(a)",
    "(b) prompt tokens/s": "(b)",
    "(c) tokens/s": "(c)",
    "(d) tokens/s": "(d)",
    "(d) TTFT p99, s": "(d) TTFT p99",
    "(d) inter-token p99, s": "(d) inter-token p99",
    "cold start to a token, s": "cold start",
    "peak memory, GB": "peak memory",
}

_HEAD = """\
# Results beside peers

Penstock to the peer: the median of each round's ratio, and how many rounds there were; above 1 Penstock is better, of
times and memory too. Each run's page has the figures, their spread, the command and the machine. Runs differ in
threads, in how busy a shared machine was and in whether peers without a turn were stopped, as in those on the Intel
machine, so compare within one. [What each came after](../README.md#beside-peers). Made by
`python -m benchmarks.peers.index`.
"""


def index() -> str:
    """Return the page: a table for each kind of machine, the newest run first."""
    runs = [(file.stem, json.loads(file.read_text())) for file in sorted(RESULTS.glob("*.json"), reverse=True)]
    beside = [(stem, run) for stem, run in runs if run.get("ratios")]
    beside.sort(key=lambda named: (_machine(named[1]), named[1]["conditions"]["date"]), reverse=True)
    lines = [_HEAD]
    for machine, group in groupby(beside, lambda named: _machine(named[1])):
        body = [row for stem, run in group for row in _rows(stem, run)]
        lines += [f"## {machine}\n", *markdown_table(["run", "commit", "threads", "", *_COLUMNS.values()], body), ""]
    return "\n".join(lines)


def _machine(run: Mapping[str, Any]) -> str:
    machine = run["conditions"]["machine"]
    return f"{machine['cores']} cores, {machine['processor']}: {', '.join(machine['vector_units'])}"


def _rows(stem: str, run: Mapping[str, Any]) -> list[list[str]]:
    conditions = run["conditions"]
    rounds = {(ratio["ours"], ratio["theirs"], ratio["label"]): ratio["rounds"] for ratio in run["ratios"]}
    pairs = list(dict.fromkeys((ours, theirs) for ours, theirs, _ in rounds))
    return [
        [
            f"[{stem}]({stem}.md)",
            conditions["commit"],
            str(conditions["threads"]),
            f"{ours.removeprefix('penstock ')} / {theirs}",
            *(_cell(rounds.get((ours, theirs, label), [])) for label in _COLUMNS),
        ]
        for ours, theirs in pairs
    ]


def _cell(rounds: list[float]) -> str:
    if not rounds:
        return ""
    median = f"{statistics.median(rounds):.2f}"
    return median if len(rounds) == 1 else f"{median} ({len(rounds)})"


def main() -> None:
    """Write the page."""
    INDEX.write_text(index())


if __name__ == "__main__":
    main()
