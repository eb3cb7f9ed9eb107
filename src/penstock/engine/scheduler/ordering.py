"""Which of two requests goes first, before fairness between tenants has its say."""

from typing import Protocol

from penstock.engine.request import Sequence

OrderingKey = tuple[int, int, float, int]


class OrderingPolicy(Protocol):
    """Orders sequences; must not change while a sequence waits or runs."""

    def key(self, sequence: Sequence) -> OrderingKey:
        """Return what to compare: the smaller goes first. The first item is the class, which fairness respects."""


class EarliestDeadlineFirst:
    """More urgent classes first, within one those that ran before and were preempted, then by deadline.

    Best effort requests have no deadline and go in the order they came.
    """

    def key(self, sequence: Sequence) -> OrderingKey:
        """Return (class, never preempted, deadline, arrival)."""
        request = sequence.request
        return request.priority, not sequence.preemptions, request.deadline_at_s, request.number
