"""The queue in front of the engine: ordered within a tenant, fair between tenants."""

import heapq
from collections.abc import Iterator

from penstock.engine.request import Sequence
from penstock.engine.scheduler.fairness import TokenFairness
from penstock.engine.scheduler.ordering import OrderingKey, OrderingPolicy


class _TenantQueue:
    """One tenant's sequences. Removal from the middle leaves a stale heap entry that is skipped later."""

    def __init__(self) -> None:
        self._heap: list[tuple[OrderingKey, int, Sequence]] = []
        self.since: dict[int, tuple[int, float, Sequence]] = {}
        """(ticket, since when, who) by sequence id, in the order they began to wait"""

    def push(self, key: OrderingKey, ticket: int, sequence: Sequence, now_s: float) -> None:
        heapq.heappush(self._heap, (key, ticket, sequence))
        self.since[sequence.id] = (ticket, now_s, sequence)

    def remove(self, sequence: Sequence) -> None:
        del self.since[sequence.id]
        while self._heap and self._is_stale(self._heap[0]):
            heapq.heappop(self._heap)
        if len(self._heap) > 2 * len(self.since) + 64:
            self._heap = [entry for entry in self._heap if not self._is_stale(entry)]
            heapq.heapify(self._heap)

    def first(self, starved_since_s: float) -> tuple[bool, OrderingKey, Sequence]:
        """Return (whether it starves, its key, who): the longest waiting if that one starves, else the first."""
        _, since_s, oldest = next(iter(self.since.values()))
        key, _, sequence = self._heap[0]
        return (True, key, oldest) if since_s < starved_since_s else (False, key, sequence)

    def _is_stale(self, entry: tuple[OrderingKey, int, Sequence]) -> bool:
        _, ticket, sequence = entry
        return sequence.id not in self.since or self.since[sequence.id][0] != ticket


class WaitingQueue:
    """Sequences that hold no blocks."""

    def __init__(self, ordering: OrderingPolicy, fairness: TokenFairness) -> None:
        self._ordering = ordering
        self._fairness = fairness
        self._tenants: dict[str, _TenantQueue] = {}
        self._next_ticket = 0
        self._num_sequences = 0
        self.num_tokens = 0

    def __len__(self) -> int:
        return self._num_sequences

    def __iter__(self) -> Iterator[Sequence]:
        return (sequence for queue in self._tenants.values() for _, _, sequence in queue.since.values())

    def push(self, sequence: Sequence, now_s: float) -> None:
        """Append a sequence that is not in the queue."""
        queue = self._tenants.setdefault(sequence.request.tenant, _TenantQueue())
        queue.push(self._ordering.key(sequence), self._next_ticket, sequence, now_s)
        self._next_ticket += 1
        self._num_sequences += 1
        self.num_tokens += sequence.num_tokens

    def remove(self, sequence: Sequence) -> None:
        """Take out a sequence that is in the queue."""
        tenant = sequence.request.tenant
        queue = self._tenants[tenant]
        queue.remove(sequence)
        if not queue.since:
            del self._tenants[tenant]
        self._num_sequences -= 1
        self.num_tokens -= sequence.num_tokens

    def first(self, now_s: float, starvation_s: float) -> Sequence | None:
        """Return who goes next: by class, then by what the tenant was served, then by order within the tenant.

        A sequence that waited longer than ``starvation_s`` counts as of the most urgent class that waits, so classes
        cannot starve it; tenants stay equal, so a long queue of one tenant's is no claim on another's share.
        """
        if not self._tenants:
            return None
        heads = [(name, *queue.first(now_s - starvation_s)) for name, queue in self._tenants.items()]
        most_urgent = min(key[0] for _, _, key, _ in heads)
        served = self._fairness.served
        best = min(heads, key=lambda head: (most_urgent if head[1] else head[2][0], served(head[0]), head[2]))
        return best[3]
