"""Figures over items, and how sure they are: the bootstrap.

A figure is a function of sums over items (a loss is a sum of negative log-likelihoods over a number of tokens, BLEU is
made of sums of counts), so resampling items means resampling rows of one table [N, K]. Two models are compared on the
same items, resampled together: what makes an item hard for both cancels out (Efron and Tibshirani, "An Introduction to
the Bootstrap", 1993; Koehn, "Statistical Significance Tests for Machine Translation Evaluation", EMNLP 2004).
Intervals are percentile intervals: nearly right from some tens of items on, too narrow for few.

N items, K sums, B resamples.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Table = NDArray[np.float64]

LEVEL = 0.95
NUM_RESAMPLES = 2000
_AT_ONCE = 250
"""Resamples drawn together: their counts of N items each are in memory at once."""


@dataclass(frozen=True, slots=True)
class Metric:
    """A figure over items."""

    name: str
    of: Callable[[Table], Table]
    """From sums [..., K] to values [...]"""
    better: Literal["higher", "lower"]
    is_share: bool = False
    """A number from 0 to 1, shown in percent"""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value and the interval that holds the true one in 95 of 100 samples of items like these."""

    value: float
    low: float | None
    """None where there were fewer than two items, which say nothing of how others differ"""
    high: float | None


def estimate(items_NK: Table, metric: Metric, *, seed: int = 0) -> Estimate:
    """Return the metric over all items."""
    return bootstrap([items_NK], lambda sums: metric.of(sums[0]), seed=seed)


def paired_difference(candidate_NK: Table, reference_NK: Table, metric: Metric, *, seed: int = 0) -> Estimate:
    """Return how much higher the candidate's figure is than the reference's on the same items."""
    return bootstrap([candidate_NK, reference_NK], lambda sums: metric.of(sums[0]) - metric.of(sums[1]), seed=seed)


def paired_increase(candidate_NK: Table, reference_NK: Table, metric: Metric, *, seed: int = 0) -> Estimate:
    """Return the difference as a share of the reference's figure."""
    return bootstrap([candidate_NK, reference_NK], lambda sums: metric.of(sums[0]) / metric.of(sums[1]) - 1, seed=seed)


def bootstrap(tables: list[Table], statistic: Callable[[list[Table]], Table], *, seed: int = 0) -> Estimate:
    """Return ``statistic`` of the sums of ``tables`` [N, K], rows of all resampled together.

    ``statistic`` takes sums [..., K], one for each table, and returns values [...].
    """
    num_items = len(tables[0])
    assert all(len(table) == num_items for table in tables), "items are paired"
    value = float(statistic([table.sum(0) for table in tables]))
    if num_items < 2:
        return Estimate(value, None, None)
    draw = np.random.default_rng(seed)
    even = np.full(num_items, 1 / num_items)
    values = []
    for start in range(0, NUM_RESAMPLES, _AT_ONCE):
        counts_BN = draw.multinomial(num_items, even, size=min(_AT_ONCE, NUM_RESAMPLES - start)).astype(np.float64)
        values.append(statistic([counts_BN @ table for table in tables]))
    tail = 50 * (1 - LEVEL)
    low, high = np.percentile(np.concatenate(values), [tail, 100 - tail])
    return Estimate(value, float(low), float(high))
