"""Figures as people read them, the same in every form of a report."""

from collections.abc import Callable, Sequence

from penstock.eval.result import Check, ClosenessReport, Figure, Side, SpeedReport, Spread, TaskReport, Verdict
from penstock.eval.statistics import Estimate
from penstock.units import format_bytes, format_duration

LABELS = {
    "loss": "loss, nats per token",
    "token_perplexity": "token perplexity",
    "word_perplexity": "word perplexity",
    "acc": "accuracy",
    "acc_norm": "accuracy by character",
    "exact_match": "exact match",
    "f1": "F1",
    "bleu": "BLEU-4",
}


def show(value: float, *, is_share: bool) -> str:
    """Return a figure with the digits that matter."""
    if is_share:
        return f"{value:.1%}"
    return f"{value:,.4f}" if abs(value) < 10 else f"{value:,.2f}"


def show_change(value: float, *, is_share: bool) -> str:
    """Return a difference, with its sign."""
    return f"{value * 100:+.1f} pt" if is_share else f"{value:+.4f}" if abs(value) < 10 else f"{value:+,.2f}"


def show_estimate(found: Estimate, *, is_share: bool) -> str:
    """Return a figure and its interval."""
    return f"{show(found.value, is_share=is_share)}{_interval(found, lambda value: show(value, is_share=is_share))}"


def show_difference(figure: Figure) -> str:
    """Return candidate minus reference and its interval; for a loss as a share as well."""
    assert figure.difference is not None
    text = show_change(figure.difference.value, is_share=figure.is_share)
    text += _interval(figure.difference, lambda value: show_change(value, is_share=figure.is_share))
    return f"{text}, {figure.increase.value:+.2%}" if figure.increase is not None else text


def task_headers(*, with_reference: bool) -> list[str]:
    """Return the headers of ``task_rows``."""
    return ["task", "figure", "items", *(("candidate", "reference", "difference") if with_reference else ("value",))]


def task_rows(tasks: Sequence[TaskReport]) -> list[list[str]]:
    """Return a row for each figure: task, figure, items, and its value, or both sides' and their difference."""
    rows = []
    for task in tasks:
        for number, figure in enumerate(task.figures):
            begins = [task.name if number == 0 else "", LABELS[figure.name], f"{task.num_items:,}"]
            if figure.reference is None:
                values = [show_estimate(figure.candidate, is_share=figure.is_share)]
            else:
                sides = (figure.candidate, figure.reference)
                values = [*(show(side.value, is_share=figure.is_share) for side in sides), show_difference(figure)]
            rows.append([*begins, *values])
    return rows


def pace_rows(speed: SpeedReport) -> list[list[str]]:
    """Return a row for each side: its name, tokens/s, and time to the first token."""
    return [
        [name, show_spread(pace.tokens_per_s), show_spread(pace.first_token_s, is_time=True)]
        for name, pace in (("candidate", speed.candidate), ("reference", speed.reference))
        if pace is not None
    ]


def show_load(speed: SpeedReport) -> str:
    """Return how speed was measured."""
    by_turns = " by turns" if speed.reference is not None else ""
    return (
        f"one request at a time, {speed.num_prompt_tokens} + {speed.num_output_tokens} tokens, median (least..most) of "
        f"{speed.num_rounds} rounds{by_turns}"
    )


def closeness_rows(found: ClosenessReport) -> list[list[str]]:
    """Return a row for each figure of how far two are apart."""
    return [
        ["KL divergence, nats per token", show_small(found.kl)],
        ["top-1 agreement", show_percent(found.top1_agreement)],
        ["rise of the loss", show_percent(found.loss_increase)],
    ]


def show_small(found: Estimate) -> str:
    """Return a figure near zero and its interval."""
    return f"{found.value:.3g}{_interval(found, '{:.3g}'.format)}"


def show_percent(found: Estimate) -> str:
    """Return a share and its interval, two digits behind the point."""
    return f"{found.value:.2%}{_interval(found, '{:.2%}'.format)}"


def show_spread(spread: Spread, *, is_time: bool = False) -> str:
    """Return median and spread of rounds."""
    form = format_duration if is_time else "{:.3g}".format
    return f"{form(spread.median)} ({form(spread.least)}..{form(spread.most)})"


def show_check(check: Check) -> str:
    """Return one threshold's outcome in a sentence."""
    form = "{:.2%}".format if check.is_share else "{:.3g}".format
    if check.worst is None:
        return f"{check.what} is {form(check.value)}; too few items to know how sure that is (raise --limit)"
    is_bound = "at least" if check.at_least else "at most"
    sure = "" if check.worst == check.value else f" (95% sure of {is_bound} {form(check.worst)})"
    wanted = f"wanted {is_bound} {form(check.bound)}"
    inside = check.value >= check.bound if check.at_least else check.value <= check.bound
    undecided = "; more items may decide it (raise --limit)" if inside and not check.passed else ""
    return f"{check.what} is {form(check.value)}{sure}, {wanted}{undecided}"


def show_verdict(verdict: Verdict) -> str:
    """Return the verdict in a word."""
    return "PASS" if verdict.passed else "FAIL"


def show_side(side: Side) -> str:
    """Return a side's label and size."""
    return f"{side.label} ({side.num_parameters / 1e6:.3g}M parameters, {format_bytes(side.weights_bytes)} of weights)"


def _interval(found: Estimate, form: Callable[[float], str]) -> str:
    return "" if found.low is None or found.high is None else f" ({form(found.low)}..{form(found.high)})"
