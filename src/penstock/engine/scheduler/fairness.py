"""Token-weighted fairness between tenants, by virtual token counters.

After Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024): the waiting tenant that was served the
fewest weighted tokens goes next, and a tenant that was away starts level with the least served of those present,
so that absence earns no credit.
"""

INPUT_WEIGHT = 1
OUTPUT_WEIGHT = 2
"""Relative cost of a prompt token and of a generated one, as in the paper."""


_MOST_REMEMBERED = 1024


class TokenFairness:
    """A counter for each tenant that has work, and for those who left owing, while anybody has work."""

    def __init__(self) -> None:
        self._counters: dict[str, int] = {}
        self._num_active: dict[str, int] = {}

    def enter(self, tenant: str) -> None:
        """A sequence of ``tenant`` begins to wait or run."""
        if tenant not in self._num_active:
            floor = min((self._counters[name] for name in self._num_active), default=0)
            self._counters[tenant] = max(self._counters.get(tenant, 0), floor)
            self._num_active[tenant] = 0
        self._num_active[tenant] += 1

    def leave(self, tenant: str) -> None:
        """A sequence of ``tenant`` has ended."""
        self._num_active[tenant] -= 1
        if self._num_active[tenant]:
            return
        del self._num_active[tenant]
        if not self._num_active:
            self._counters.clear()
        elif len(self._counters) > _MOST_REMEMBERED:
            self._counters = {name: self._counters[name] for name in self._num_active}

    def charge(self, tenant: str, *, num_input_tokens: int = 0, num_output_tokens: int = 0) -> None:
        """Count tokens served to ``tenant``."""
        self._counters[tenant] += INPUT_WEIGHT * num_input_tokens + OUTPUT_WEIGHT * num_output_tokens

    def served(self, tenant: str) -> int:
        """Return the weighted tokens ``tenant`` was served; comparable between tenants, meaningless alone."""
        return self._counters[tenant]
