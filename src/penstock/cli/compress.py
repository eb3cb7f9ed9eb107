"""`penstock compress`: show what will be done, do it, show what came out."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.table import Table

from penstock.compress.run import Compression, CompressOptions, Progress, Report
from penstock.units import format_bytes, format_duration


def run_compress(options: CompressOptions, *, dry_run: bool, as_json: bool) -> int:
    """Compress and return the exit status. Tables and progress go to stderr where JSON goes to stdout."""
    console = Console(stderr=as_json)
    compression = Compression(options)
    _show_plan(compression, console)
    if dry_run:
        if as_json:
            _print_json(compression, None)
        return 0
    with _bars() as progress:
        report = compression.run(progress)
    _show_report(report, options.out, console)
    if as_json:
        _print_json(compression, report)
    return 0


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


def _print_json(compression: Compression, report: Report | None) -> None:
    calibration = compression.calibration
    values = {
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
    sys.stdout.write(json.dumps(values, indent=2) + "\n")


@contextmanager
def _bars() -> Iterator[Progress]:
    """Yield what shows how far a run is, on a terminal's last line."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Bars(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task("starting")

        def show(what: str, done: int, total: int) -> None:
            bars.update(task, description=what, completed=done, total=total)

        yield show
