"""An evaluation for the terminal."""

from collections.abc import Iterator, Sequence
from io import StringIO

from rich.console import Console
from rich.table import Table

from penstock.eval.report.words import (
    closeness_rows,
    pace_rows,
    show_check,
    show_load,
    show_side,
    show_spread,
    show_verdict,
    task_headers,
    task_rows,
)
from penstock.eval.result import ClosenessReport, EvalReport, SpeedReport, TaskReport


def format_report(report: EvalReport) -> str:
    """Return the report as tables, and the verdict last."""
    text = StringIO()
    console = Console(file=text, width=140, no_color=True)
    console.print(f"candidate  {show_side(report.candidate)}", highlight=False)
    if report.reference is not None:
        console.print(f"reference  {show_side(report.reference)}", highlight=False)
    if report.tasks:
        console.print(_tasks(report.tasks, with_reference=report.reference is not None))
        console.print("in brackets: 95% intervals, bootstrapped over items, both models on the same ones")
    for line in _measurements(report):
        console.print(line, highlight=False, soft_wrap=True)
    if report.verdict is not None:
        console.print(f"\nverdict    {show_verdict(report.verdict)}", highlight=False)
        for check in report.verdict.checks:
            console.print(f"  {'ok  ' if check.passed else 'not '}{show_check(check)}", highlight=False, soft_wrap=True)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


def _measurements(report: EvalReport) -> Iterator[str]:
    for setting in report.settings:
        yield f"\n{setting.setting}, {_on(setting.closeness)}:"
        yield from _closeness(setting.closeness)
        if setting.num_reused_tokens is not None:
            yield f"  {'prompt tokens reused':<29}  {setting.num_reused_tokens:,}"
        if setting.largest_difference is not None:
            yield f"  {'largest difference':<29}  {setting.largest_difference:.3g} nats of any token"
    if report.closeness is not None:
        yield f"\n{_on(report.closeness)}, the candidate from the reference:"
        yield from _closeness(report.closeness)
    if report.speed is not None:
        yield from _speed(report.speed)


def _tasks(tasks: Sequence[TaskReport], *, with_reference: bool) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", title=" ")
    for number, header in enumerate(task_headers(with_reference=with_reference)):
        table.add_column(header, justify="right" if number > 1 else "left", no_wrap=True)
    for name, figure, items, *values in task_rows(tasks):
        table.add_row(name, figure, items if name else "", *values)
    return table


def _on(found: ClosenessReport) -> str:
    return f"on {found.num_tokens:,} tokens of {found.text}"


def _closeness(found: ClosenessReport) -> Iterator[str]:
    for name, value in closeness_rows(found):
        yield f"  {name:<29}  {value}"
    if found.layer_errors is not None:
        errors = "  ".join(f"{error:.3g}" for error in found.layer_errors)
        yield f"  relative error after each layer, and of the final states: {errors}"


def _speed(speed: SpeedReport) -> Iterator[str]:
    yield f"\n{show_load(speed)}:"
    for name, rate, first in pace_rows(speed):
        yield f"  {name}  {rate} tokens/s, first token after {first}"
    if speed.tokens_per_s_ratio is not None:
        yield f"  ratio of tokens/s, each round: {show_spread(speed.tokens_per_s_ratio)}"
