"""One choice for each item, of the least total loss that a budget allows: the multiple-choice knapsack, exactly.

Dynamic programming over the budget (Kellerer, Pferschy and Pisinger, "Knapsack Problems", 2004, chapter 11). Costs
beyond each item's cheapest choice are counted in steps of their greatest common divisor, and nothing is rounded. Only
where that would take too large a table are steps longer: costs are then rounded up to them, so that a budget always
holds, and ``step`` says by how much an item may be thought dearer than it is.
"""

from collections.abc import Sequence
from math import gcd

import numpy as np

_MOST_CELLS = 1 << 28
"""Of the table of choices, a byte each"""


class Knapsack:
    """All budgets' best choices at once."""

    def __init__(
        self, costs: Sequence[Sequence[int]], losses: Sequence[Sequence[float]], *, most_cells: int = _MOST_CELLS
    ) -> None:
        """Item i's choice j costs ``costs[i][j]`` and loses ``losses[i][j]``; losses may be negative."""
        self._costs = costs
        self.smallest = sum(map(min, costs))
        self.largest = sum(map(max, costs))
        extra = [[cost - min(item) for cost in item] for item in costs]
        exact = gcd(*(cost for item in extra for cost in item)) or 1
        most_steps = max(most_cells // len(costs), 1)
        coarse = -(-(self.largest - self.smallest) // most_steps)
        self.is_exact = coarse <= exact
        self.step = exact if self.is_exact else coarse
        steps = [[-(-cost // self.step) for cost in item] for item in extra]
        self._steps = steps
        size = sum(map(max, steps)) + 1
        # least[s]: the least loss of the items so far at no more than s steps beyond their cheapest choices.
        least = np.zeros(size)
        self._choices = np.zeros((len(costs), size), dtype=np.uint8)
        for item, (item_steps, item_losses) in enumerate(zip(steps, losses, strict=True)):
            best = np.full(size, np.inf)
            for choice in sorted(range(len(item_steps)), key=item_steps.__getitem__):
                first = item_steps[choice]
                loss = least[: size - first] + item_losses[choice]
                better = loss < best[first:]
                best[first:][better] = loss[better]
                self._choices[item, first:][better] = choice
            least = best

    def choose(self, budget: int) -> list[int]:
        """Return each item's choice, for a ``budget`` of at least ``smallest``."""
        assert budget >= self.smallest, "not even the cheapest choices fit"
        left = min((budget - self.smallest) // self.step, self._choices.shape[1] - 1)
        if budget >= self.largest:
            left = self._choices.shape[1] - 1
        chosen = []
        for item in reversed(range(len(self._costs))):
            choice = int(self._choices[item, left])
            chosen.append(choice)
            left -= self._steps[item][choice]
        return chosen[::-1]

    def cost(self, choices: Sequence[int]) -> int:
        """Return what ``choices`` cost together."""
        return sum(item[choice] for item, choice in zip(self._costs, choices, strict=True))
