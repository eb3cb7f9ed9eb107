"""How fast the engine has lately been, so that a promise can be checked before it is made."""


class PrefillRate:
    """Smoothed tokens per second over the steps that carried prompt tokens."""

    _GAIN = 0.2

    def __init__(self) -> None:
        self.tokens_per_s: float | None = None
        """None until a step with prompt tokens has been timed."""

    def observe(self, num_tokens: int, duration_s: float) -> None:
        """Take one step of ``num_tokens`` into the rate."""
        if duration_s <= 0:
            return
        rate = num_tokens / duration_s
        if self.tokens_per_s is None:
            self.tokens_per_s = rate
        else:
            self.tokens_per_s += self._GAIN * (rate - self.tokens_per_s)

    def seconds_for(self, num_tokens: int) -> float:
        """Return how long ``num_tokens`` take; 0 while the rate is unknown, so that nobody is refused on a guess."""
        return num_tokens / self.tokens_per_s if self.tokens_per_s else 0.0
