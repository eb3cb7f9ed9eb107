"""What every task offers."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

from penstock.errors import InvalidSetting
from penstock.eval.statistics import Metric, Table
from penstock.eval.subject import Subject
from penstock.text import Tokenizer

Format = Literal["auto", "chat", "plain", "text"]
"""How a question is put: ``chat`` in the model's template, ``plain`` as ``Question: ...`` and ``Answer:``, ``auto`` in
the template if the model has one and else plain, ``text`` as it is."""

OnItem = Callable[[int, int], None]
"""Called with how many items are done, of how many."""


class Task(Protocol):
    """Items with a known outcome, and the metrics that are made of how a model does on them."""

    name: str
    kind: str

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """What is made of the items; the first is the one that verdicts go by."""

    @property
    def data_sha256(self) -> str:
        """The hash of everything the task asks and expects."""

    async def score(self, subject: Subject, *, limit: int | None, on_item: OnItem) -> Table:
        """Return the items' sums [N, K], of the first ``limit`` items. Raises ``PenstockError``."""


@dataclass(frozen=True, slots=True)
class Context:
    """Text that an answer follows."""

    text: str
    begins_text: bool
    """Whether the tokenizer adds what begins a text (BOS); a template has written it already"""
    gap: str
    """What stands between it and the answer"""

    def token_ids(self, tokenizer: Tokenizer, answer: str = "") -> list[int]:
        """Return the tokens of the text, and of ``answer`` behind it."""
        whole = f"{self.text}{self.gap}{answer}" if answer else self.text
        return tokenizer.encode(whole, add_special_tokens=self.begins_text)


def put(question: str, subject: Subject, form: Format) -> Context:
    """Return ``question`` as ``form`` has it. Raises ``InvalidSetting`` for a chat without a template."""
    if form == "text":
        return Context(question.rstrip(" "), begins_text=True, gap=" ")
    if form == "plain" or (form == "auto" and subject.template is None):
        return Context(f"Question: {question}\nAnswer:", begins_text=True, gap=" ")
    if subject.template is None:
        raise InvalidSetting("the task wants a chat, and the model has no chat template; give format: plain or auto")
    turns = [{"role": "user", "content": question}]
    return Context(subject.template.render(turns, add_generation_prompt=True), begins_text=False, gap="")


def sha256_of(*parts: object) -> str:
    """Return the hash of plain data."""
    return hashlib.sha256(json.dumps(parts, ensure_ascii=False).encode()).hexdigest()
