"""Multiple choice by log-likelihood: the model is shown each answer, and picks the one it finds likeliest."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from penstock.eval.statistics import Metric, Table
from penstock.eval.subject import Subject, each
from penstock.eval.tasks.base import Context, Format, OnItem, put, sha256_of

ACCURACY = Metric("acc", lambda sums: sums[..., 0] / sums[..., 2], better="higher", is_share=True)
"""Share of items whose right answer has the highest log-likelihood"""
NORMED_ACCURACY = Metric("acc_norm", lambda sums: sums[..., 1] / sums[..., 2], better="higher", is_share=True)
"""The same with each answer's log-likelihood over its length in characters, as lm-evaluation-harness has it"""


@dataclass(frozen=True, slots=True)
class ChoiceItem:
    """A question and its answers."""

    question: str
    choices: tuple[str, ...]
    """None of them empty"""
    right: int
    """Which of ``choices``"""


class MultipleChoiceTask:
    """Questions with a few answers each, one of them right."""

    kind = "multiple_choice"
    metrics = (ACCURACY, NORMED_ACCURACY)

    def __init__(self, name: str, items: Sequence[ChoiceItem], *, form: Format = "auto") -> None:
        self.name = name
        self._items = items
        self._form = form

    @cached_property
    def data_sha256(self) -> str:
        """The hash of questions, answers and how they are put."""
        return sha256_of([(item.question, item.choices, item.right) for item in self._items], self._form)

    async def score(self, subject: Subject, *, limit: int | None, on_item: OnItem) -> Table:
        """Return for each item (right by likelihood, right by normed likelihood, 1)."""

        async def one(item: ChoiceItem) -> tuple[float, float, float]:
            context = put(item.question, subject, self._form)
            likelihoods = [await log_likelihood(subject, context, choice) for choice in item.choices]
            normed = [value / len(choice) for value, choice in zip(likelihoods, item.choices, strict=True)]
            return float(_argmax(likelihoods) == item.right), float(_argmax(normed) == item.right), 1.0

        return np.array(await each(self._items[:limit], one, on_item))


async def log_likelihood(subject: Subject, context: Context, answer: str) -> float:
    """Return the log-likelihood of ``answer``, which is not empty, behind ``context``.

    Both are tokenized as one text; the answer's tokens are those behind as many as the context has by itself.
    """
    ids = context.token_ids(subject.tokenizer, answer)
    num_context = len(context.token_ids(subject.tokenizer))
    return sum((await subject.logprobs(ids))[num_context - 1 :])


def _argmax(values: Sequence[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)
