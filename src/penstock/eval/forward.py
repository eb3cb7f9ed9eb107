"""Loaded models side by side, without an engine: losses, how far two are apart, and where they part.

T tokens of a window, E hidden width, V vocabulary, R rows of logits at a time, N windows.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from penstock.errors import InvalidSetting
from penstock.eval.statistics import Metric, Table
from penstock.eval.windows import TextWindows
from penstock.kernels import BatchLayout, KVBlocks
from penstock.models.model import LanguageModel

_BLOCK_SIZE = 16
_ROWS = 128
"""Rows of logits in memory at a time, of each model"""

KL = Metric("kl", lambda sums: sums[..., 0] / sums[..., 2], better="lower")
"""Nats per token: the Kullback-Leibler divergence of the candidate's next-token distribution from the reference's"""
TOP1_AGREEMENT = Metric("top1_agreement", lambda sums: sums[..., 1] / sums[..., 2], better="higher", is_share=True)
"""Share of positions where both find the same token likeliest"""


@dataclass(frozen=True, slots=True)
class Closeness:
    """How far a candidate is from its reference on the same windows."""

    items: Table
    """[N, 3]: KL summed over positions, positions that agree, positions"""
    candidate_nats: tuple[float, ...]
    """Each window's negative log-likelihood by the candidate"""
    reference_nats: tuple[float, ...]
    layer_errors: tuple[float, ...] | None
    """After each layer, and at last of the final hidden states: the norm of the difference over the reference's norm.
    What a layer adds is on top of what came before it. None for models of different depths."""


class _Reader:
    """A model and a cache for one window."""

    def __init__(self, model: LanguageModel, num_tokens: int) -> None:
        if num_tokens > model.config.max_positions:
            raise InvalidSetting(
                f"windows of {num_tokens} tokens are longer than the {model.config.max_positions} the model was made "
                "for; lower --window"
            )
        num_blocks = -(-num_tokens // _BLOCK_SIZE)
        self._model = model
        self._layout = BatchLayout.pack([num_tokens], [num_tokens], [range(num_blocks)], _BLOCK_SIZE)
        self._cache: list[KVBlocks] = model.new_cache(num_blocks, _BLOCK_SIZE)

    def hidden_states(self, window: Tensor) -> Iterator[Tensor]:
        """Yield [T, E] after each layer and the final ones."""
        return self._model.hidden_states(window, self._layout, self._cache)

    def final(self, window: Tensor) -> Tensor:
        """Return the final hidden states [T, E]."""
        return self._model.forward(window, self._layout, self._cache)

    def logprobs(self, hidden: Tensor) -> Tensor:
        """Return log probabilities [R, V] float32."""
        return F.log_softmax(self._model.logits(hidden), dim=-1)


@torch.inference_mode()
def window_nats(
    model: LanguageModel, windows: Sequence[Sequence[int]], on_window: Callable[[int, int], None] = lambda _, __: None
) -> list[float]:
    """Return each window's negative log-likelihood in nats; its first token is not predicted.

    Windows are of one length. Raises ``InvalidSetting`` if the model cannot hold one.
    """
    reader = _Reader(model, len(windows[0]))
    nats = []
    for number, ids in enumerate(windows, start=1):
        window = torch.tensor(ids)
        hidden = reader.final(window)
        total = 0.0
        for rows in _row_slices(len(ids)):
            total -= _picked(reader.logprobs(hidden[rows]), window, rows)
        nats.append(total)
        on_window(number, len(windows))
    return nats


def perplexity(model: LanguageModel, cut: TextWindows, *, limit: int | None = None) -> float:
    """Return the token perplexity of the first ``limit`` windows. Raises ``InvalidSetting`` as ``window_nats``."""
    nats = window_nats(model, cut.windows[:limit])
    return math.exp(sum(nats) / (len(nats) * cut.num_predicted))


@torch.inference_mode()
def closeness(
    candidate: LanguageModel,
    reference: LanguageModel,
    windows: Sequence[Sequence[int]],
    on_window: Callable[[int, int], None] = lambda _, __: None,
) -> Closeness:
    """Return how far ``candidate`` is from ``reference``, which read the same vocabulary.

    Both read a window layer by layer in turns, so that two hidden states are in memory and not those of all layers.
    Raises ``InvalidSetting`` if one cannot hold a window or their vocabularies differ in size.
    """
    if candidate.config.vocab_size != reference.config.vocab_size:
        raise InvalidSetting(
            f"the models have vocabularies of {candidate.config.vocab_size} and {reference.config.vocab_size} tokens, "
            "so their distributions cannot be compared"
        )
    left, right = _Reader(candidate, len(windows[0])), _Reader(reference, len(windows[0]))
    has_layers = candidate.config.num_layers == reference.config.num_layers
    squares = np.zeros((candidate.config.num_layers + 1, 2))
    items, candidate_nats, reference_nats = [], [], []
    for number, ids in enumerate(windows, start=1):
        window = torch.tensor(ids)
        if has_layers:
            depth = 0
            for x, y in zip(left.hidden_states(window), right.hidden_states(window), strict=True):
                squares[depth] += _square(x - y), _square(y)
                depth += 1
            num_states = depth
        else:
            x, y = left.final(window), right.final(window)
        kl, num_agree, losses = 0.0, 0, [0.0, 0.0]
        for rows in _row_slices(len(ids)):
            p, q = left.logprobs(x[rows]), right.logprobs(y[rows])
            kl += float(F.kl_div(p, q, reduction="sum", log_target=True))
            num_agree += int((p.argmax(-1) == q.argmax(-1)).sum())
            losses[0] -= _picked(p, window, rows)
            losses[1] -= _picked(q, window, rows)
        items.append((kl, num_agree, len(ids) - 1))
        candidate_nats.append(losses[0])
        reference_nats.append(losses[1])
        on_window(number, len(windows))
    errors = tuple(np.sqrt(squares[:num_states, 0] / squares[:num_states, 1]).tolist()) if has_layers else None
    return Closeness(np.array(items), tuple(candidate_nats), tuple(reference_nats), errors)


def _row_slices(num_tokens: int) -> Iterator[slice]:
    """Yield the rows that predict a token, some at a time: all but the last."""
    for start in range(0, num_tokens - 1, _ROWS):
        yield slice(start, min(start + _ROWS, num_tokens - 1))


def _picked(logprobs: Tensor, window: Tensor, rows: slice) -> float:
    """Return the summed log probability of the tokens that come after ``rows``."""
    targets = window[rows.start + 1 : rows.stop + 1]
    return float(logprobs.gather(-1, targets.unsqueeze(-1)).double().sum())


def _square(x: Tensor) -> float:
    return float(x.float().square().sum(dtype=torch.float64))
