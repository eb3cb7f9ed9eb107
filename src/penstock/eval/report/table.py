"""An evaluation for the terminal."""

from collections.abc import Iterator
from io import StringIO

from rich.console import Console
from rich.table import Table

from penstock.eval.report.words import (
    LABELS,
    show,
    show_check,
    show_difference,
    show_estimate,
    show_percent,
    show_side,
    show_small,
    show_spread,
    show_verdict,
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
    for line in _closeness(report.closeness):
        console.print(line, highlight=False)
    for line in _speed(report.speed):
        console.print(line, highlight=False)
    if report.verdict is not None:
        console.print(f"\nverdict    {show_verdict(report.verdict)}", highlight=False)
        for check in report.verdict.checks:
            console.print(f"  {'ok  ' if check.passed else 'not '}{show_check(check)}", highlight=False, soft_wrap=True)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


def _tasks(tasks: tuple[TaskReport, ...], *, with_reference: bool) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", title=" ")
    for header in ("task", "items", "figure", "candidate"):
        table.add_column(header, justify="right" if header in ("items", "candidate") else "left", no_wrap=True)
    if with_reference:
        table.add_column("reference", justify="right", no_wrap=True)
        table.add_column("difference", justify="right", no_wrap=True)
    for task in tasks:
        for number, figure in enumerate(task.figures):
            begins = [task.name, f"{task.num_items:,}"] if number == 0 else ["", ""]
            if figure.reference is None:
                values = [show_estimate(figure.candidate, is_share=figure.is_share)]
            else:
                sides = (figure.candidate, figure.reference)
                values = [*(show(side.value, is_share=figure.is_share) for side in sides), show_difference(figure)]
            table.add_row(*begins, LABELS[figure.name], *values)
    return table


def _closeness(found: ClosenessReport | None) -> Iterator[str]:
    if found is None:
        return
    yield f"\non {found.num_tokens:,} tokens of {found.text}, the candidate from the reference:"
    yield f"  KL divergence    {show_small(found.kl)} nats per token"
    yield f"  top-1 agreement  {show_percent(found.top1_agreement)}"
    if found.layer_errors is not None:
        errors = "  ".join(f"{error:.3g}" for error in found.layer_errors)
        yield f"  relative error after each layer, and of the final states: {errors}"


def _speed(speed: SpeedReport | None) -> Iterator[str]:
    if speed is None:
        return
    yield (
        f"\none request at a time, {speed.num_prompt_tokens} + {speed.num_output_tokens} tokens, "
        f"median (least..most) of {speed.num_rounds} rounds{' by turns' if speed.reference else ''}:"
    )
    for name, pace in (("candidate", speed.candidate), ("reference", speed.reference)):
        if pace is not None:
            first = show_spread(pace.first_token_s, is_time=True)
            yield f"  {name}  {show_spread(pace.tokens_per_s)} tokens/s, first token after {first}"
    if speed.tokens_per_s_ratio is not None:
        yield f"  ratio of tokens/s, each round: {show_spread(speed.tokens_per_s_ratio)}"
