"""The queue in front of the engine: bounded, ordered within a tenant, fair between tenants."""

import heapq
from collections.abc import Iterator

from penstock.engine.request import Sequence
from penstock.engine.scheduler.fairness import TokenFairness
from penstock.engine.scheduler.ordering import OrderingKey, OrderingPolicy


class WaitingQueue:
    """Sequences that hold no blocks. Removal from the middle leaves a stale heap entry that is skipped later."""

    def __init__(self, ordering: OrderingPolicy, fairness: TokenFairness) -> None:
        self._ordering = ordering
        self._fairness = fairness
        self._heaps: dict[str, list[tuple[OrderingKey, int, Sequence]]] = {}
        # (ticket, since when) by sequence id, in the order they began to wait, as the starvation bound needs it.
        self._since: dict[int, tuple[int, float, Sequence]] = {}
        self._next_ticket = 0
        self.num_tokens = 0

    def __len__(self) -> int:
        return len(self._since)

    def __iter__(self) -> Iterator[Sequence]:
        return (sequence for _, _, sequence in self._since.values())

    def push(self, sequence: Sequence, now_s: float) -> None:
        """Append a sequence that is not in the queue."""
        tenant = sequence.request.tenant
        ticket = self._next_ticket
        self._next_ticket += 1
        heapq.heappush(self._heaps.setdefault(tenant, []), (self._ordering.key(sequence), ticket, sequence))
        self._since[sequence.id] = (ticket, now_s, sequence)
        self.num_tokens += sequence.num_tokens

    def remove(self, sequence: Sequence) -> None:
        """Take out a sequence that is in the queue."""
        del self._since[sequence.id]
        self.num_tokens -= sequence.num_tokens
        tenant = sequence.request.tenant
        heap = self._heaps[tenant]
        while heap and self._is_stale(heap[0]):
            heapq.heappop(heap)
        if not heap:
            del self._heaps[tenant]
        elif len(heap) > 2 * len(self._since) + 64:
            heap[:] = [entry for entry in heap if not self._is_stale(entry)]
            heapq.heapify(heap)

    def first(self, now_s: float, starvation_s: float) -> Sequence | None:
        """Return who goes next: the longest waiting if it starves, else by class, fairness and order."""
        oldest = next(iter(self._since.values()), None)
        if oldest is None:
            return None
        _, since_s, sequence = oldest
        if now_s - since_s > starvation_s:
            return sequence
        served = self._fairness.served
        best = min(self._heaps.items(), key=lambda item: (item[1][0][0][0], served(item[0]), item[1][0][0]))
        return best[1][0][2]

    def _is_stale(self, entry: tuple[OrderingKey, int, Sequence]) -> bool:
        _, ticket, sequence = entry
        return sequence.id not in self._since or self._since[sequence.id][0] != ticket
