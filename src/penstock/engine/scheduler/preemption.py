"""Who gives up its blocks when a running sequence needs one and none is free."""

from collections.abc import Iterable
from typing import Protocol

from penstock.engine.kv import CacheManager
from penstock.engine.request import Sequence


class VictimPolicy(Protocol):
    """Chooses among running sequences."""

    def choose(self, candidates: Iterable[Sequence], cache: CacheManager) -> Sequence | None:
        """Return the sequence to preempt, or None if preempting any of them frees nothing."""


class CheapestToRecompute:
    """The least urgent class gives way first; within it, who loses the fewest computed tokens.

    Blocks shared with others stay where they are and cost nothing to find again, so only private ones count. Each
    earlier preemption makes a sequence dearer, so that nobody is thrown out again and again.
    """

    def choose(self, candidates: Iterable[Sequence], cache: CacheManager) -> Sequence | None:
        """Return the cheapest candidate that holds a private block; the latest arrival among equals."""
        best: Sequence | None = None
        best_cost: tuple[int, int, int] | None = None
        for sequence in candidates:
            num_private = cache.num_private(sequence.table)
            if not num_private:
                continue
            tokens = min(sequence.num_computed_tokens, num_private * cache.block_size)
            request = sequence.request
            cost = (-request.priority, tokens * (1 + len(sequence.preemptions)), -request.number)
            if best_cost is None or cost < best_cost:
                best, best_cost = sequence, cost
        return best
