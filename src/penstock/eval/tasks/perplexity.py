"""Perplexity of a text, per token and per word."""

from functools import cached_property

import numpy as np

from penstock.errors import InvalidSetting
from penstock.eval.statistics import Metric, Table
from penstock.eval.subject import Subject, each
from penstock.eval.tasks.base import OnItem, sha256_of
from penstock.eval.windows import DEFAULT_WINDOW, TextWindows, cut_windows
from penstock.text import Tokenizer

LOSS = Metric("loss", lambda sums: sums[..., 0] / sums[..., 1], better="lower")
"""Nats per token"""
TOKEN_PERPLEXITY = Metric("token_perplexity", lambda sums: np.exp(sums[..., 0] / sums[..., 1]), better="lower")
WORD_PERPLEXITY = Metric("word_perplexity", lambda sums: np.exp(sums[..., 0] / sums[..., 2]), better="lower")
"""The loss per token times the text's tokens per word: lm-evaluation-harness's word perplexity, over windows"""


class PerplexityTask:
    """A text; an item is a window, see ``windows``."""

    kind = "perplexity"
    metrics = (LOSS, TOKEN_PERPLEXITY, WORD_PERPLEXITY)

    def __init__(self, name: str, text: str, *, window: int = DEFAULT_WINDOW) -> None:
        self.name = name
        self.window = window
        self._text = text

    @cached_property
    def data_sha256(self) -> str:
        """The hash of text and window."""
        return sha256_of(self._text, self.window)

    def windows(self, tokenizer: Tokenizer) -> TextWindows:
        """Return the text as ``tokenizer`` cuts it. Raises ``InvalidSetting`` if it is too short."""
        return cut_windows(self._text, tokenizer, window=self.window, name=self.name)

    async def score(self, subject: Subject, *, limit: int | None, on_item: OnItem) -> Table:
        """Return for each window (negative log-likelihood in nats, tokens predicted, words they make)."""
        most = subject.client.model().max_model_tokens
        if self.window > most:
            raise InvalidSetting(
                f"windows of {self.window} tokens are longer than the {most} this model is run with; lower --window"
            )
        cut = self.windows(subject.tokenizer)
        logprobs = await each(cut.windows[:limit], subject.logprobs, on_item)
        return loss_table([-sum(window) for window in logprobs], cut)


def loss_table(nats: list[float], cut: TextWindows) -> Table:
    """Return the table [N, 3] of ``PerplexityTask.score`` from each window's negative log-likelihood."""
    predicted = np.full(len(nats), cut.num_predicted, dtype=np.float64)
    return np.stack([np.array(nats), predicted, predicted * cut.words_per_token], axis=1)
