"""Intervals that hold the truth as often as they say."""

import numpy as np
import pytest

from penstock.eval.statistics import Metric, Table, estimate, paired_difference, paired_increase

MEAN = Metric("mean", lambda sums: sums[..., 0] / sums[..., 1], better="higher")


def table(values: Table) -> Table:
    return np.stack([values, np.ones_like(values)], axis=1)


def test_intervals_hold_the_true_mean_about_95_times_in_100() -> None:
    draw = np.random.default_rng(1)
    num_trials = 200
    held = 0
    for seed in range(num_trials):
        found = estimate(table(draw.exponential(2.0, 80)), MEAN, seed=seed)
        assert found.low is not None
        assert found.high is not None
        held += found.low <= 2.0 <= found.high
    # Skewed as these are, a percentile interval holds a little less than 95; three deviations of a count on top.
    assert 0.88 <= held / num_trials <= 0.99


def test_the_width_is_the_standard_errors() -> None:
    values = np.random.default_rng(2).normal(5.0, 3.0, 400)
    found = estimate(table(values), MEAN)
    assert found.low is not None
    assert found.high is not None
    assert found.value == pytest.approx(values.mean())
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * values.std() / 20, rel=0.1)


def test_pairing_removes_what_items_have_in_common() -> None:
    draw = np.random.default_rng(3)
    hardness = draw.normal(0, 10, 100)
    candidate, reference = table(hardness + 1 + draw.normal(0, 0.1, 100)), table(hardness)
    difference = paired_difference(candidate, reference, MEAN)
    assert difference.low is not None
    assert difference.high is not None
    assert difference.low < 1.0 < difference.high or difference.value == pytest.approx(1.0, abs=0.03)
    assert difference.high - difference.low < 0.1
    own = estimate(candidate, MEAN)
    assert own.low is not None
    assert own.high is not None
    assert own.high - own.low > 3


def test_equal_sides_differ_by_exactly_nothing() -> None:
    same = table(np.random.default_rng(4).normal(3, 1, 30))
    difference, increase = paired_difference(same, same.copy(), MEAN), paired_increase(same, same.copy(), MEAN)
    assert (difference.low, difference.value, difference.high) == (0.0, 0.0, 0.0)
    assert (increase.low, increase.value, increase.high) == (0.0, 0.0, 0.0)


def test_a_seed_gives_the_same_interval_and_one_item_gives_none() -> None:
    values = table(np.random.default_rng(5).normal(3, 1, 30))
    assert estimate(values, MEAN, seed=7) == estimate(values, MEAN, seed=7)
    assert estimate(values, MEAN, seed=7) != estimate(values, MEAN, seed=8)
    assert estimate(values[:1], MEAN).low is None
