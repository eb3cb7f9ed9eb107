"""Greedy answers against references: exact match, F1 and BLEU-4."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from PIL.Image import Image

from penstock.eval.statistics import Metric, Table
from penstock.eval.subject import Subject, each
from penstock.eval.tasks.answers import exact_match, f1
from penstock.eval.tasks.base import Format, OnItem, put, sha256_of
from penstock.eval.tasks.bleu import bleu_of, bleu_sums
from penstock.protocol import Picture

EXACT_MATCH = Metric("exact_match", lambda sums: sums[..., 0] / sums[..., 2], better="higher", is_share=True)
F1 = Metric("f1", lambda sums: sums[..., 1] / sums[..., 2], better="higher", is_share=True)
BLEU = Metric("bleu", lambda sums: bleu_of(sums[..., 3:]), better="higher")
"""From 0 to 100, over all answers together"""


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked, and every answer that counts as right."""

    text: str
    answers: tuple[str, ...]
    image: Image | None = None
    """RGB, shown before the text"""


class GenerationTask:
    """Questions with short answers."""

    kind = "generation"
    metrics = (EXACT_MATCH, F1, BLEU)

    def __init__(
        self,
        name: str,
        questions: Sequence[Question],
        *,
        max_tokens: int = 64,
        stop: tuple[str, ...] = ("\n",),
        form: Format = "auto",
    ) -> None:
        self.name = name
        self._questions = questions
        self._max_tokens = max_tokens
        self._stop = stop
        self._form = form

    @cached_property
    def data_sha256(self) -> str:
        """The hash of questions, answers and how they are asked."""
        asked = [
            (one.text, one.answers, *([] if one.image is None else [hashlib.sha256(one.image.tobytes()).hexdigest()]))
            for one in self._questions
        ]
        return sha256_of(asked, self._max_tokens, self._stop, self._form)

    async def score(self, subject: Subject, *, limit: int | None, on_item: OnItem) -> Table:
        """Return for each question (exact, F1, 1, and what BLEU sums)."""

        async def one(question: Question) -> tuple[float, ...]:
            pictures: tuple[Picture, ...] = ()
            if question.image is None:
                prompt = put(question.text, subject, self._form).token_ids(subject.tokenizer)
            else:
                prompt, pictures = await subject.shown(question.image, question.text)
            answer = await subject.answer(prompt, pictures=pictures, max_tokens=self._max_tokens, stop=self._stop)
            answer = answer.strip()
            references = question.answers
            best_f1 = max(f1(answer, reference) for reference in references)
            is_exact = any(exact_match(answer, reference) for reference in references)
            return float(is_exact), best_f1, 1.0, *bleu_sums(answer, references)

        return np.array(await each(self._questions[:limit], one, on_item))
