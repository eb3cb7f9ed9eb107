"""Whether reusing cached prefixes changes what a model says: it must not, and this measures by how much it does.

Prompts that grow, each beginning with the one before, go to two engines that differ in ``cache.prefix_caching`` alone.
Log-likelihoods of a prompt's own tokens would not do, for an engine that is asked for them reads the whole prompt; so
the whole distribution of the token behind each prompt is compared. V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from penstock.eval.forward import Closeness
from penstock.eval.subject import Subject
from penstock.eval.tasks import OnItem
from penstock.protocol import SamplingParams

NUM_PROMPTS = 4
"""Prompts that one window is cut into"""


@dataclass(frozen=True, slots=True)
class PrefixReuse:
    """What reuse did."""

    closeness: Closeness
    """Of the engine that reuses from the one that does not, over the tokens behind prompts"""
    num_reused_tokens: int
    largest_difference: float
    """Of any log-likelihood of any token, in nats"""


async def prefix_reuse(
    reusing: Subject, computing: Subject, windows: Sequence[Sequence[int]], on_item: OnItem
) -> PrefixReuse:
    """Return how far the two are apart on ``windows``. Raises ``PenstockError``."""
    before = reusing.client.status().counters.num_prefix_hits
    items: list[tuple[float, int, int]] = []
    nats: tuple[list[float], list[float]] = ([], [])
    largest = 0.0
    for number, window in enumerate(windows, start=1):
        kl, num_agree, losses = 0.0, 0, [0.0, 0.0]
        ends = [len(window) * (i + 1) // NUM_PROMPTS - 1 for i in range(NUM_PROMPTS)]
        for end in ends:
            p, q = [await _logprobs_behind(subject, window[:end]) for subject in (reusing, computing)]
            kl += float((np.exp(q) * (q - p)).sum())
            num_agree += int(p.argmax() == q.argmax())
            losses[0] -= p[window[end]]
            losses[1] -= q[window[end]]
            largest = max(largest, float(np.abs(p - q).max()))
        items.append((kl, num_agree, len(ends)))
        nats[0].append(losses[0])
        nats[1].append(losses[1])
        on_item(number, len(windows))
    closeness = Closeness(np.array(items), tuple(nats[0]), tuple(nats[1]), None)
    return PrefixReuse(closeness, reusing.client.status().counters.num_prefix_hits - before, largest)


async def _logprobs_behind(subject: Subject, prompt: Sequence[int]) -> NDArray[np.float64]:
    """Return the log-likelihood [V] of each token behind ``prompt``."""
    vocab_size = subject.client.model().vocab_size
    sampling = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True, logprobs=vocab_size)
    (delta,) = await subject.run(list(prompt), sampling)
    values = np.empty(vocab_size)
    for candidate in delta.logprobs[0].top:
        values[candidate.token_id] = candidate.logprob
    return values
