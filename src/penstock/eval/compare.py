"""Run tasks on a model, or the same on two, and put figures and paired differences together."""

from collections.abc import Callable, Sequence

import numpy as np

from penstock.errors import InvalidSetting
from penstock.eval.forward import KL, TOP1_AGREEMENT, Closeness
from penstock.eval.result import ClosenessReport, Figure, Side, TaskReport
from penstock.eval.statistics import Metric, Table, estimate, paired_difference, paired_increase
from penstock.eval.subject import Subject
from penstock.eval.tasks import OnItem, PerplexityTask, Task
from penstock.eval.tasks.perplexity import LOSS
from penstock.protocol import ModelInfo

OnTask = Callable[[str], OnItem]
"""Called as a task begins, with its name; what it returns is called for each item."""


def side_of(model: ModelInfo) -> Side:
    """Return what reports say about a model that an engine runs."""
    cache = "" if model.kv_dtype in (model.dtype, "bfloat16", "float32") else f", {model.kv_dtype} cache"
    return Side(
        name=model.name,
        label=f"{model.name} {model.dtype}{cache}",
        architecture=model.architecture,
        dtype=model.dtype,
        kv_dtype=model.kv_dtype,
        num_parameters=model.num_parameters,
        weights_bytes=model.memory.weights_bytes,
        kernels=model.kernels,
        sees=model.sees,
    )


def require_same_windows(tasks: Sequence[Task], candidate: Subject, reference: Subject) -> None:
    """Raise ``InvalidSetting`` if the two read a text in different tokens: losses per token are then not comparable."""
    for task in tasks:
        if isinstance(task, PerplexityTask) and (
            task.windows(candidate.tokenizer) != task.windows(reference.tokenizer)
        ):
            raise InvalidSetting(
                f"the two models split {task.name!r} into different tokens, so their losses cannot be paired; evaluate "
                "each by itself and compare word perplexities, or leave texts out with --task"
            )


async def run_tasks(tasks: Sequence[Task], subject: Subject, *, limit: int | None, on_task: OnTask) -> list[Table]:
    """Return each task's items. Raises ``PenstockError``."""
    return [await task.score(subject, limit=limit, on_item=on_task(task.name)) for task in tasks]


def report_tasks(
    tasks: Sequence[Task], candidate: Sequence[Table], reference: Sequence[Table] | None, *, seed: int = 0
) -> tuple[TaskReport, ...]:
    """Return the figures of ``run_tasks``' tables, beside and against a reference's if there is one."""
    others: Sequence[Table | None] = reference if reference is not None else [None] * len(tasks)
    return tuple(
        TaskReport(
            name=task.name,
            kind=task.kind,
            num_items=len(own),
            data_sha256=task.data_sha256,
            figures=tuple(_figure(metric, own, other, seed) for metric in task.metrics),
        )
        for task, own, other in zip(tasks, candidate, others, strict=True)
    )


def report_closeness(text: str, found: Closeness, *, seed: int = 0) -> ClosenessReport:
    """Return the figures of ``closeness`` on the text called ``text``."""
    num_predicted = found.items[:, 2]
    losses = [np.stack([np.array(nats), num_predicted], 1) for nats in (found.candidate_nats, found.reference_nats)]
    return ClosenessReport(
        text=text,
        num_tokens=int(num_predicted.sum()),
        kl=estimate(found.items, KL, seed=seed),
        top1_agreement=estimate(found.items, TOP1_AGREEMENT, seed=seed),
        loss_increase=paired_increase(losses[0], losses[1], LOSS, seed=seed),
        layer_errors=found.layer_errors,
    )


def _figure(metric: Metric, own: Table, other: Table | None, seed: int) -> Figure:
    candidate = estimate(own, metric, seed=seed)
    described = {"name": metric.name, "better": metric.better, "is_share": metric.is_share}
    if other is None:
        return Figure(candidate=candidate, **described)  # type: ignore[arg-type]
    reference = estimate(other, metric, seed=seed)
    return Figure(
        candidate=candidate,
        reference=reference,
        difference=paired_difference(own, other, metric, seed=seed),
        # Shares and scores may be zero, in the figure or in a resample.
        increase=paired_increase(own, other, metric, seed=seed) if metric.better == "lower" else None,
        **described,  # type: ignore[arg-type]
    )
