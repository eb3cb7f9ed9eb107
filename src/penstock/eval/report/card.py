"""A model card as Hugging Face has it: YAML that its hub reads, then Markdown for people."""

import re
from collections.abc import Iterator, Sequence

from penstock.eval.report.words import (
    LABELS,
    closeness_rows,
    pace_rows,
    show_check,
    show_load,
    show_side,
    show_verdict,
    task_headers,
    task_rows,
)
from penstock.eval.result import EvalReport

_METRIC_TYPES = {
    "loss": "loss",
    "token_perplexity": "perplexity",
    "word_perplexity": "perplexity",
    "acc": "accuracy",
    "acc_norm": "accuracy",
    "exact_match": "exact_match",
    "f1": "f1",
    "bleu": "bleu",
}
"""By our names, those that the hub knows"""
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def model_card(report: EvalReport) -> str:
    """Return the card of the candidate. What only its maker knows, its license first, is left to be added."""
    # Slow to import.
    from huggingface_hub import EvalResult, ModelCardData

    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=task.name,
            dataset_name=task.name,
            dataset_revision=task.data_sha256,
            metric_type=_METRIC_TYPES[figure.name],
            metric_name=LABELS[figure.name],
            metric_value=round(figure.candidate.value, 6),
        )
        for task in report.tasks
        for figure in task.figures
    ]
    base = report.reference.name if report.reference is not None else report.candidate.name
    data = ModelCardData(
        base_model=base if _HUB_ID.fullmatch(base) else None,
        library_name="penstock",
        pipeline_tag="image-text-to-text" if report.candidate.sees else "text-generation",
        tags=["penstock", report.candidate.dtype],
        model_name=report.candidate.label,
        eval_results=results or None,
    )
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(_body(report)) + "\n"


def _body(report: EvalReport) -> Iterator[str]:
    candidate, reference = report.candidate, report.reference
    yield f"# {candidate.label}\n"
    yield f"{show_side(candidate)}, {candidate.architecture}, run by Penstock {report.conditions['penstock']}"
    yield f"in {candidate.dtype} with keys and values in {candidate.kv_dtype}.\n"
    if reference is not None:
        yield f"Compared with {show_side(reference)}.\n"
    if report.verdict is not None:
        yield f"**Verdict: {show_verdict(report.verdict)}**\n"
        yield from (
            f"- {'kept' if check.passed else 'not kept'}: {show_check(check)}" for check in report.verdict.checks
        )
        yield ""
    yield "## Evaluation\n"
    yield from _table(task_headers(with_reference=reference is not None), task_rows(report.tasks))
    if report.closeness is not None:
        found = report.closeness
        yield from _table(
            [f"from the reference, on {found.num_tokens:,} tokens of {found.text}", ""], closeness_rows(found)
        )
    if report.speed is not None:
        yield from _table(["", "tokens/s after the first", "first token"], pace_rows(report.speed))
        yield f"Speed: {show_load(report.speed)}, on {report.conditions['machine']}.\n"
    yield "## How it was measured\n"
    yield f"`{report.conditions['command']}`, {report.conditions['date']}, Python {report.conditions['python']}."
    yield "In brackets: 95% intervals, bootstrapped over items. Data of the tasks, by SHA-256:\n"
    yield from (f"- {task.name}: `{task.data_sha256}`" for task in report.tasks)


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(headers)} |\n|{'---|' * len(headers)}"
    yield from (f"| {' | '.join(row)} |" for row in rows)
    yield ""
