"""The best choices under a budget, against trying them all."""

from itertools import product

from hypothesis import given
from hypothesis import strategies as st

from penstock.compress.auto.knapsack import Knapsack

_ITEM = st.lists(st.tuples(st.integers(0, 40), st.floats(-1, 10)), min_size=1, max_size=4)


def _least(costs: list[list[int]], losses: list[list[float]], budget: int) -> float:
    """Return the least loss, by trying everything."""
    return min(
        sum(item[i] for item, i in zip(losses, choices, strict=True))
        for choices in product(*(range(len(item)) for item in costs))
        if sum(item[i] for item, i in zip(costs, choices, strict=True)) <= budget
    )


@given(st.lists(_ITEM, min_size=1, max_size=5), st.integers(0, 220), st.integers(1, 5))
def test_no_other_choices_lose_less(items: list[list[tuple[int, float]]], room: int, unit: int) -> None:
    costs = [[cost * unit for cost, _ in item] for item in items]
    losses = [[loss for _, loss in item] for item in items]
    knapsack = Knapsack(costs, losses)
    assert knapsack.is_exact
    budget = knapsack.smallest + room
    choices = knapsack.choose(budget)
    assert knapsack.cost(choices) <= budget
    found = sum(item[i] for item, i in zip(losses, choices, strict=True))
    assert abs(found - _least(costs, losses, budget)) < 1e-9


@given(st.lists(_ITEM, min_size=1, max_size=5), st.integers(0, 220))
def test_a_table_that_would_be_too_large_rounds_to_the_safe_side(
    items: list[list[tuple[int, float]]], room: int
) -> None:
    costs = [[cost for cost, _ in item] for item in items]
    losses = [[loss for _, loss in item] for item in items]
    knapsack = Knapsack(costs, losses, most_cells=8 * len(items))
    budget = knapsack.smallest + room
    choices = knapsack.choose(budget)
    assert knapsack.cost(choices) <= budget
    found = sum(item[i] for item, i in zip(losses, choices, strict=True))
    # As good as anything that fits when each item is thought a step dearer.
    poorer = max(budget - knapsack.step * (len(items) + 1), knapsack.smallest)
    assert found <= _least(costs, losses, poorer) + 1e-9
