"""Whether the cache can take one more sequence."""

from typing import Protocol

from penstock.engine.request import Sequence


class AdmissionPolicy(Protocol):
    """Says how many tokens to set blocks aside for; the scheduler admits while the sum fits the pool."""

    def expected_tokens(self, sequence: Sequence) -> int:
        """Return the tokens, prompt and output, that ``sequence`` is expected to grow to."""

    def observe(self, sequence: Sequence) -> None:
        """Learn from a sequence that has finished."""


class WorstCase:
    """Set aside all a sequence may ever need: nothing is ever preempted, and much of the cache stays unused."""

    def expected_tokens(self, sequence: Sequence) -> int:
        """Return prompt and ``max_tokens``."""
        return sequence.num_prompt_tokens + sequence.request.sampling.max_tokens

    def observe(self, sequence: Sequence) -> None:
        """Learn nothing."""


class ExpectedGrowth:
    """Set aside the prompt and as much output as answers have lately had, but never more than ``max_tokens``.

    The expectation is the smoothed mean plus twice the smoothed mean deviation (the estimator TCP uses for round
    trips, RFC 6298, with its gains); until the first answer has ended it is the worst case.
    """

    _MEAN_GAIN = 1 / 8
    _DEVIATION_GAIN = 1 / 4

    def __init__(self) -> None:
        self._mean: float | None = None
        self._deviation = 0.0

    def expected_tokens(self, sequence: Sequence) -> int:
        """Return the prompt, what was generated, and what is likely to follow."""
        most = sequence.request.sampling.max_tokens
        if self._mean is not None:
            likely = int(self._mean + 2 * self._deviation)
            most = min(most, max(likely, sequence.num_output_tokens + 1))
        return sequence.num_prompt_tokens + most

    def observe(self, sequence: Sequence) -> None:
        """Take the output length of a finished sequence into the expectation."""
        length = sequence.num_output_tokens
        if self._mean is None:
            self._mean, self._deviation = float(length), length / 2
            return
        self._deviation += self._DEVIATION_GAIN * (abs(length - self._mean) - self._deviation)
        self._mean += self._MEAN_GAIN * (length - self._mean)
