"""Method by bits, what each costs: `python -m benchmarks.compression_table --write README.md`.

Everything is done by the commands a user has, each in a process of its own: `penstock compress`, whose seconds,
processor time and peak resident memory (the high-water mark that the kernel keeps) are noted, and `penstock eval`,
which gives perplexity on held-out modules of the standard library (beside the original's, with a 95% interval of the
increase), the share of right answers, and tokens a second, by turns with the original. The second table is of a model
of Qwen2.5-0.5B's shape with random weights, which is written to disk first: what it says means nothing, so that in its
place stand the mean change of products with calibration inputs, time and memory.

``--write FILE`` puts the tables between two markers in FILE; without it they are printed.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.peers.machine import describe_machine
from benchmarks.peers.model import SHAPES, make_model

BEGIN, END = "<!-- compression table begins -->", "<!-- compression table ends -->"
_FAILED_VERDICT = 3
_ANSWERS = (("recall", "exact_match"), ("signatures", "acc"))
_ROW = "steps: [{{match: decoder, method: {method}, bits: {bits}, group: 128, symmetric: {symmetric}}}]"


@dataclass(frozen=True, slots=True)
class Case:
    """A line of a table."""

    name: str
    recipe: str
    """A named one, or a file's text"""


CASES = (
    Case("int8", "int8"),
    Case("w8a8-smooth", "w8a8-smooth"),
    *(
        Case(f"{method} {bits} bits g128", _ROW.format(method=method, bits=bits, symmetric=symmetric))
        for bits, symmetric in ((4, "true"), (3, "false"))
        for method in ("rtn", "gptq", "awq")
    ),
)


@dataclass(frozen=True, slots=True)
class Cost:
    """What a command took."""

    seconds: float
    processor_seconds: float
    peak_bytes: int
    answer: dict[str, Any]


def run(*arguments: str | Path) -> Cost:
    """Run a penstock command that prints JSON. Raises SystemExit with what it said if it fails."""
    start = time.perf_counter()
    with tempfile.TemporaryFile() as said, tempfile.TemporaryFile() as complained:
        command = [str(Path(sys.executable).with_name("penstock")), *map(str, arguments), "--json"]
        process = subprocess.Popen(command, stdout=said, stderr=complained)
        # The kernel's account of this process alone, and of threads and children it waited for.
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        said.seek(0)
        complained.seek(0)
        if process.returncode not in (0, _FAILED_VERDICT):
            raise SystemExit(f"{' '.join(map(str, arguments))} failed:\n{complained.read().decode()[-2000:]}")
        answer = json.loads(said.read())
    return Cost(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024, answer)


def compress(model: str | Path, case: Case, work: Path, options: Sequence[str]) -> tuple[Path, Cost]:
    """Return where the compressed model is, and what it took."""
    recipe = case.recipe
    if ":" in recipe:
        file = work / "recipe.yaml"
        file.write_text(recipe)
        recipe = str(file)
    out = work / case.name.replace(" ", "-")
    return out, run("compress", model, "--out", out, "--recipe", recipe, *options)


def quality_table(limit: int, samples: int, names: Sequence[str]) -> list[str]:
    """Return the lines on penstock-mini."""
    lines = [
        "| weights | perplexity | increase | recall | signatures | MB | tokens/s, of the original's | "
        "seconds (of processors) | peak GB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    tasks = [word for name in ("source", "recall", "signatures") for word in ("--task", name)]
    # A loss is what is to be seen here, not a reason to stop.
    options = [*tasks, "--limit", str(limit), "--within", "loss=1000%"]
    chosen = [case for case in CASES if case.name in names]
    with tempfile.TemporaryDirectory() as scratch:
        for case in chosen:
            out, cost = compress("penstock-mini", case, Path(scratch), ["--samples", str(samples)])
            report = cost.answer["report"]
            found = run("eval", out, "--against", "penstock-mini", *options).answer
            figures = {(task["name"], one["name"]): one for task in found["tasks"] for one in task["figures"]}
            perplexity = figures["source", "token_perplexity"]
            if case is chosen[0]:
                shown = (perplexity, *(figures[key] for key in _ANSWERS))
                values = [one["reference"]["value"] for one in shown]
                lines.append(
                    f"| bf16 | {values[0]:.2f} | | {values[1]:.0%} | {values[2]:.0%} | "
                    f"{report['bytes_before'] / 1e6:.2f} | 1 | | |"
                )
            grown, ratio = perplexity["increase"], found["speed"]["tokens_per_s_ratio"]
            recall, signatures = (figures[key]["candidate"]["value"] for key in _ANSWERS)
            lines.append(
                f"| {case.name} | {perplexity['candidate']['value']:.2f} | {grown['value']:+.2%} "
                f"({grown['low']:+.2%} to {grown['high']:+.2%}) | {recall:.0%} | {signatures:.0%} | "
                f"{report['bytes_after'] / 1e6:.2f} | {_spread(ratio)} | {_costs(cost)} |"
            )
            print(lines[-1], flush=True)
    return lines


def size_table(shape: str, samples: int, names: Sequence[str]) -> list[str]:
    """Return the lines on a model of ``shape`` with random weights."""
    lines = [
        "| weights | products change by | MB | tokens/s, of the original's | seconds (of processors) | peak GB |",
        "|---|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        original, text = make_model(work / "original", SHAPES[shape]), work / "text.txt"
        text.write_text("words " * 200)
        for case in CASES:
            if case.name not in names:
                continue
            # Nothing is likely to a random model.
            out, cost = compress(original, case, work, ["--samples", str(samples), "--force"])
            report = cost.answer["report"]
            options = ["--task", str(text), "--limit", "1", "--window", "64", "--within", "loss=1000%"]
            ratio = run("eval", out, "--against", original, *options).answer["speed"]["tokens_per_s_ratio"]
            errors = [unit["error"] for unit in report["units"] if unit["error"] is not None]
            change = format(mean(errors), ".2%") if errors else ""
            size = f"{report['bytes_after'] / 1e6:,.1f} of {report['bytes_before'] / 1e6:,.1f}"
            lines.append(f"| {case.name} | {change} | {size} | {_spread(ratio)} | {_costs(cost)} |")
            print(lines[-1], flush=True)
    return lines


def _spread(ratio: dict[str, float]) -> str:
    return f"{ratio['median']:.2f} ({ratio['least']:.2f} to {ratio['most']:.2f})"


def _costs(cost: Cost) -> str:
    return f"{cost.seconds:.0f} ({cost.processor_seconds:.0f}) | {cost.peak_bytes / 1e9:.2f}"


def main() -> None:
    """Measure, and print or write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, default=200, help="items of each task")
    parser.add_argument("--samples", type=int, default=128, help="calibration sequences of the first table")
    parser.add_argument("--random-samples", type=int, default=32, help="of the second")
    parser.add_argument("--shape", choices=SHAPES, default="qwen2.5-0.5b", help="of the random model")
    names = [case.name for case in CASES]
    parser.add_argument("--recipes", nargs="*", choices=names, default=names, help="lines of the first table")
    parser.add_argument("--random-recipes", nargs="*", choices=names, default=names[:5], help="of the second")
    parser.add_argument("--write", type=Path, help="file with markers to write between")
    options = parser.parse_args()
    started = time.strftime("%Y-%m-%d", time.gmtime())
    quality = quality_table(options.limit, options.samples, options.recipes)
    size = size_table(options.shape, options.random_samples, options.random_recipes)
    text = "\n".join(
        [
            f"`penstock-mini`, at most {options.limit} items of each task, {options.samples} calibration sequences, "
            f"{started}, {os.cpu_count()} cores of {describe_machine()['processor']}:",
            "",
            *quality,
            "",
            f"`{options.shape}` with random weights, {options.random_samples} calibration sequences:",
            "",
            *size,
        ]
    )
    if options.write is None:
        print(f"\n{text}")
        return
    page = options.write.read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise SystemExit(f"{options.write} has no {BEGIN} with {END} behind it")
    options.write.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
