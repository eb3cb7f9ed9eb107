"""R rows, V tokens, K candidates."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from penstock.kernels.sampling.rows import DrawRow, TopTokens

_ROWS_TOGETHER = 16
_NARROW = 1024
"""Candidates looked at before a full sort: top_p rarely needs more, and choosing these is far cheaper."""


def draw_tokens(logits: npt.NDArray[np.float32], rows: Sequence[DrawRow]) -> list[int]:
    """Return a token for each row of ``logits`` [R, V]; -1 where the highest is not a finite number.

    Without a temperature it is the likeliest, the first of several. Otherwise logits are divided by the temperature,
    and the row's distribution is inverted at its number: in the order of the vocabulary, or, where the tail is cut, in
    that of likelihood. What is left: the ``top_k`` likeliest; of those the fewest whose share of their probability
    reaches ``top_p`` (Holtzman et al., "The Curious Case of Neural Text Degeneration", 2020); of those the ones at
    least ``min_p`` times as likely as the likeliest; and always that one.
    A row's token depends on nothing but that row.
    """
    tokens: list[int] = []
    for first in range(0, len(logits), _ROWS_TOGETHER):
        some = slice(first, first + _ROWS_TOGETHER)
        tokens += _draw(torch.from_numpy(logits[some]), rows[some])
    return tokens


def _draw(logits: Tensor, rows: Sequence[DrawRow]) -> list[int]:
    number, temperature, top_k, top_p, min_p = (np.array(column) for column in zip(*rows, strict=True))
    highest, tokens = logits.max(dim=-1)
    is_random = temperature > 0
    is_cut = is_random & ((top_k > 0) | (top_p < 1) | (min_p > 0))
    numbers, temperatures = _column(number), _column(temperature.astype(np.float32))
    if (whole := np.flatnonzero(is_random & ~is_cut)).size:
        probabilities = torch.softmax(logits[whole] / temperatures[whole], dim=-1, dtype=torch.float64)
        tokens[whole] = _invert(probabilities, numbers[whole])
    if (cut := np.flatnonzero(is_cut)).size:
        values, candidates = _candidates(
            logits[cut] / temperatures[cut], top_k[cut], _column(top_p[cut]), _column(min_p[cut])
        )
        picks = _invert(torch.softmax(values, dim=-1, dtype=torch.float64), numbers[cut])
        tokens[cut] = candidates.gather(1, picks.unsqueeze(1)).squeeze(1)
    # Infinity minus itself is not a number either, so one comparison finds both.
    drawn: list[int] = torch.where((highest - highest) == 0, tokens, -1).tolist()
    return drawn


def scratch_bytes(vocab_size: int, num_threads: int) -> int:
    """Return what drawing works in: a dozen float64 copies of the rows it looks at together."""
    return 12 * 8 * _ROWS_TOGETHER * vocab_size


def top_tokens(logits: npt.NDArray[np.float32], count: int) -> TopTokens:
    """Return each row's ``count`` likeliest tokens, and what makes log-probabilities of the logits [R, V]."""
    rows = torch.from_numpy(logits)
    values, tokens = rows.topk(count, dim=-1)
    found = torch.isfinite(values).sum(-1).tolist()
    return TopTokens(
        [row[:n] for row, n in zip(tokens.tolist(), found, strict=True)],
        [row[:n] for row, n in zip(values.tolist(), found, strict=True)],
        [float(torch.logsumexp(row.double(), dim=0)) for row in rows],
    )


def _candidates(scaled: Tensor, most: npt.NDArray[np.int64], top_p: Tensor, min_p: Tensor) -> tuple[Tensor, Tensor]:
    """Return (logits, token ids), both [R, K], most likely first, of what top_k, top_p and min_p leave; cut ones -inf.

    Looks at the most likely ``_NARROW`` first and at all only where top_p or min_p reaches beyond them.
    """
    vocab_size = scaled.shape[-1]
    top_k = torch.from_numpy(np.minimum(np.where(most > 0, most, vocab_size), vocab_size)).unsqueeze(1)
    log_total = torch.logsumexp(scaled.double(), dim=-1, keepdim=True)
    num_looked_at = min(max(_NARROW, int(most.max())), vocab_size)
    while True:
        values, token_ids = scaled.topk(num_looked_at, dim=-1)
        probabilities = torch.exp(values.double() - log_total)
        within_k = torch.arange(num_looked_at) < top_k
        # top_k first: top_p is a share of what it leaves, as the reference implementations have it.
        left = probabilities * within_k
        mass = torch.where(top_k < vocab_size, left.sum(-1, keepdim=True), 1.0)
        before = (left.cumsum(-1) - left) / mass
        keep = within_k & (before < top_p) & (probabilities >= min_p * probabilities[:, :1])
        keep[:, 0] = True
        if not bool((keep[:, -1:] & (top_k > num_looked_at)).any()):
            return values.masked_fill(~keep, -torch.inf), token_ids
        num_looked_at = vocab_size


def _column(values: npt.NDArray[np.float64]) -> Tensor:
    return torch.from_numpy(values).unsqueeze(1)


def _invert(probabilities: Tensor, numbers: Tensor) -> Tensor:
    """Return for each row [R, K] the first index whose cumulative probability exceeds the row's number [R, 1]."""
    cumulative = probabilities.cumsum(-1)
    # The sum may end a rounding error below one: scale the number to it, so that a token of probability zero
    # is never picked.
    picks = torch.searchsorted(cumulative, numbers * cumulative[:, -1:], right=True).squeeze(1)
    return picks.clamp_(max=probabilities.shape[-1] - 1)
