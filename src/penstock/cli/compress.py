"""`penstock compress`: show what will be done, do it, show what came out."""

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import msgspec
import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.table import Table

from penstock.compress.auto.search import Found, Goal, Search
from penstock.compress.auto.sensitivity import CANDIDATES
from penstock.compress.run import Compression, CompressOptions, Progress, Report
from penstock.estimate.system import usable_cores
from penstock.kernels import use_threads
from penstock.units import format_bytes, format_duration, parse_bytes, parse_share


def read_goal(recipe: str | None, target_size: str | None, max_loss: str | None) -> Goal | None:
    """Return what a recipe is to be found for, None where one is given. Raises BadParameter."""
    if sum(value is not None for value in (recipe, target_size, max_loss)) > 1:
        raise typer.BadParameter("--recipe, --target-size and --max-loss exclude each other; give one")
    try:
        if target_size is not None:
            return Goal(target_bytes=parse_bytes(target_size))
        return None if max_loss is None else Goal(max_loss=parse_share(max_loss))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def use_all_threads() -> None:
    """Let kernels and torch, which work by turns here, have every core, or as many as torch was told to use."""
    use_threads(min(torch.get_num_threads(), usable_cores()), torch_works=True)


def run_compress(options: CompressOptions, goal: Goal | None, *, dry_run: bool, as_json: bool) -> int:
    """Compress, by the recipe found for a ``goal`` if there is one, and return the exit status.

    Tables and progress go to stderr where JSON goes to stdout.
    """
    use_all_threads()
    is_terminal = (sys.stderr if as_json else sys.stdout).isatty()
    # A file has no width that words must be cut to.
    console = Console(stderr=as_json, width=None if is_terminal else 120)
    if goal is not None:
        return _run_search(options, goal, console, dry_run=dry_run, as_json=as_json)
    compression = Compression(options)
    _show_plan(compression, console)
    if dry_run:
        if as_json:
            _print_json(_values(compression, None))
        return 0
    with progress_bars() as progress:
        report = compression.run(progress)
    _show_report(report, options.out, console)
    if as_json:
        _print_json(_values(compression, report))
    return 0


def _run_search(options: CompressOptions, goal: Goal, console: Console, *, dry_run: bool, as_json: bool) -> int:
    search = Search(options, goal)
    console.print(
        f"reachable    {search.smallest_bytes:,} to {search.largest_bytes:,} bytes, each unit kept or at "
        f"{', '.join(str(one.bits) for one in CANDIDATES)} bits",
        highlight=False,
    )
    if dry_run:
        if as_json:
            _print_json({"smallest_bytes": search.smallest_bytes, "largest_bytes": search.largest_bytes})
        return 0
    with progress_bars() as progress:
        found = search.run(progress)
    _show_found(found, console)
    compression = Compression(replace(options, recipe=found.recipe, beside=found.files()))
    _show_plan(compression, console)
    with progress_bars() as progress:
        report = compression.run(progress)
        increase = search.increase(options.out)
    search.discard()
    _show_report(report, options.out, console)
    console.print(f"measured     perplexity {increase:+.2%} on texts that nothing else used", highlight=False)
    if as_json:
        _print_json({**_values(compression, report), "search": {**asdict(found), "increase": increase}})
    return 0


def _show_found(found: Found, console: Console) -> None:
    chosen = {label: step.bits for step in found.recipe.steps for label in step.match}
    rows: dict[str, dict[int, float]] = {}
    for row in found.sensitivities:
        rows.setdefault(row.unit, {})[row.bits] = row.kl
    table = Table("unit", box=None, pad_edge=False)
    for one in CANDIDATES:
        table.add_column(f"KL at {one.bits} bits", justify="right", no_wrap=True)
    table.add_column("chosen")
    for label, kl in rows.items():
        bits = chosen.get(label)
        table.add_row(label, *(f"{kl[one.bits]:.2g}" for one in CANDIDATES), "kept" if bits is None else f"{bits} bits")
    console.print(table)
    for among in found.correlations:
        console.print(
            f"rank correlation with the KL {'over all' if among.bits is None else f'at {among.bits} bits'}: "
            f"{among.weight_error:.2f} of weights' errors, {among.product_error:.2f} of products'",
            highlight=False,
        )
    console.print()


def _show_plan(compression: Compression, console: Console) -> None:
    table = Table("part", box=None, pad_edge=False)
    for name in ("treatment", "layers", "matrices", "weights", "before", "after"):
        table.add_column(name, no_wrap=True)
    for row in compression.coverage:
        table.add_row(
            row.component,
            row.treatment,
            row.layers,
            str(row.num_matrices or ""),
            f"{row.num_weights:,}",
            format_bytes(row.bytes_before),
            format_bytes(row.bytes_after),
        )
    console.print(table)
    calibration, estimate = compression.calibration, compression.estimate
    console.print(
        f"\ncalibration  {len(calibration.sequences)} sequences, {calibration.num_tokens:,} tokens, "
        f"{calibration.distinct_tokens:,} different ones; {calibration.source}",
        highlight=False,
    )
    console.print(
        f"estimate     {format_duration(estimate.seconds)}, {format_bytes(estimate.memory_bytes)} of memory, "
        f"{format_bytes(estimate.disk_bytes)} of disk on the way",
        highlight=False,
    )
    for warning in calibration.warnings:
        console.print(f"warning      {warning}", highlight=False)
    console.print()


def _show_report(report: Report, out: Path, console: Console) -> None:
    if report.first_layer:
        console.print(f"went on from layer {report.first_layer + 1}", highlight=False)
    errors = [unit for unit in report.units if unit.error is not None]
    if errors:
        worst = max(errors, key=lambda unit: unit.error or 0.0)
        console.print(f"worst unit   {worst.unit}: its products change by {worst.error:.1%}", highlight=False)
    share = report.bytes_after / report.bytes_before
    console.print(
        f"written      {out}: {format_bytes(report.bytes_after)}, {share:.0%} of {format_bytes(report.bytes_before)}, "
        f"in {format_duration(report.seconds)}",
        highlight=False,
    )
    console.print(
        f"read back    logits within {report.largest_difference:.1g} of what was made; KL from the original "
        f"{report.kl:.4f} nats per token on calibration texts",
        highlight=False,
    )


def _values(compression: Compression, report: Report | None) -> dict[str, object]:
    calibration = compression.calibration
    return {
        "coverage": [asdict(row) for row in compression.coverage],
        "calibration": {
            "source": calibration.source,
            "num_sequences": len(calibration.sequences),
            "num_tokens": calibration.num_tokens,
            "distinct_tokens": calibration.distinct_tokens,
            "warnings": calibration.warnings,
        },
        "estimate": asdict(compression.estimate),
        "report": None if report is None else asdict(report),
    }


def _print_json(values: Mapping[str, object]) -> None:
    sys.stdout.write(json.dumps(values, indent=2, default=msgspec.to_builtins) + "\n")


@contextmanager
def progress_bars() -> Iterator[Progress]:
    """Yield what shows how far a run is, on a terminal's last line."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Bars(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task("starting")

        def show(what: str, done: int, total: int) -> None:
            bars.update(task, description=what, completed=done, total=total)

        yield show
