"""Metric labels that strangers influence, kept to a bounded number of values."""

MOST_VALUES = 1000
OTHER = "other"


class BoundedLabels:
    """Lets the first ``MOST_VALUES`` different values through and turns the rest into ``other``."""

    def __init__(self, most: int = MOST_VALUES) -> None:
        self._most = most
        self._seen: set[str] = set()

    def __call__(self, value: str) -> str:
        """Return the label to use for ``value``."""
        if value in self._seen:
            return value
        if len(self._seen) >= self._most:
            return OTHER
        self._seen.add(value)
        return value
