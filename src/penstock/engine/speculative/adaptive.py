"""How many tokens to guess: as many as make the most of a step, by what guesses and rows have cost and gained lately.

After Liu et al., "Optimizing Speculative Decoding for Serving Large Language Models Using Goodput" (2024): the lengths
chosen are those with the most expected tokens per second. A guess that comes true with probability p is worth p tokens,
one behind it p * p; both cost a row. Where rows are dear, because many sequences share the step, or guesses are bad,
none pay and none are made. Estimates of what is not tried move back to where they began, so that it is tried again now
and then.
"""

import bisect
import math
from collections.abc import Sequence

from penstock.engine.speculative.drafter import Offer

_FIRST_GUESS = 0.6
"""Probability that a guess of a grade that was never tried comes true"""
_GAIN = 0.15
"""How far one guess moves the estimate of its sequence"""
_COMMON_GAIN = 0.02
"""How far it moves what sequences begin with"""
_FORGETTING = 0.005
"""How far an offer not taken moves the estimate back: after some 50 a bad one is tried again"""
_LEAST_WORTH = 0.02
"""Guesses less likely than that never pay"""
_LEAST_GAIN = 1.05
"""In tokens per second: less is within what measuring gets wrong"""
_MOST_STEPS = 64
"""With drafts before one without, so that it is known what they save"""


class DraftLengths:
    """Chooses how long the drafts of a step are."""

    def __init__(self) -> None:
        self.costs = StepCosts()
        self._drafting_s = 0.0
        """For each token of the longest draft"""
        self._num_steps = 0
        """With drafts, since one without"""
        self._common: dict[int, float] = {}
        """By grade: how likely a guess comes true"""
        self._own: dict[int, dict[int, float]] = {}
        """The same for one sequence, by its id and by grade"""

    def choose(self, num_sequences: int, offers: Sequence[Offer], most_tokens: int) -> list[int]:
        """Return how many tokens of each offer to guess, no more than ``most_tokens`` together.

        ``num_sequences`` decode in the step, those that offer nothing included.
        """
        lengths = [0] * len(offers)
        if not self.costs.is_known(num_sequences) or self._num_steps == _MOST_STEPS:
            self._num_steps = 0
            return lengths
        worths = []
        for place, offer in enumerate(offers):
            likely = self._likely(offer)
            worth = likely
            for _ in range(offer.most):
                if worth < _LEAST_WORTH:
                    break
                worths.append((worth, place))
                worth *= likely
        worths.sort(reverse=True)
        del worths[min(most_tokens, self.costs.most_rows - num_sequences) :]
        expected = float(num_sequences)
        best_rate, num_best, longest = _LEAST_GAIN * expected / self.costs.seconds(num_sequences), 0, 0
        for number, (worth, place) in enumerate(worths, 1):
            expected += worth
            lengths[place] += 1
            longest = max(longest, lengths[place])
            if num_sequences + number in _KNOTS or number == len(worths):
                rate = expected / (self.costs.seconds(num_sequences + number) + longest * self._drafting_s)
                if rate > best_rate:
                    best_rate, num_best = rate, number
        self._num_steps = self._num_steps + 1 if num_best else 0
        lengths = [0] * len(offers)
        for _, place in worths[:num_best]:
            lengths[place] += 1
        for offer, length in zip(offers, lengths, strict=True):
            if not length:
                likely = self._likely(offer)
                own = self._own.setdefault(offer.sequence.id, {})
                own[offer.grade] = likely + _FORGETTING * (_FIRST_GUESS - likely)
        return lengths

    def drafted(self, num_tokens: int, seconds: float) -> None:
        """Learn how long it took to work out drafts of up to ``num_tokens``."""
        self._drafting_s += 0.1 * (seconds / num_tokens - self._drafting_s)

    def verified(self, sequence_id: int, grade: int, num_drafted: int, num_accepted: int) -> None:
        """Learn from a draft."""
        common = self._common.get(grade, _FIRST_GUESS)
        own = self._own.setdefault(sequence_id, {})
        own[grade] = _moved(own.get(grade, common), _GAIN, num_drafted, num_accepted)
        self._common[grade] = _moved(common, _COMMON_GAIN, num_drafted, num_accepted)

    def remove(self, sequence_id: int) -> None:
        """Forget a sequence; unknown ones are ignored."""
        self._own.pop(sequence_id, None)

    def _likely(self, offer: Offer) -> float:
        common = self._common.get(offer.grade, _FIRST_GUESS)
        own = self._own.get(offer.sequence.id)
        return common if own is None else own.get(offer.grade, common)


def _moved(likely: float, gain: float, num_drafted: int, num_accepted: int) -> float:
    """Return an estimate after ``num_accepted`` guesses that came true and, unless those were all, one that did not."""
    likely = 1 - (1 - likely) * (1 - gain) ** num_accepted
    return likely if num_accepted == num_drafted else likely * (1 - gain)


_KNOTS: list[int] = sorted({*range(1, 9), *(round(math.exp2(quarter / 4)) for quarter in range(12, 65))})
"""Numbers of rows whose cost is kept: each up to eight, then four for each doubling"""


class StepCosts:
    """Seconds that a step takes by its number of rows, where every sequence decodes."""

    _NUM_NEEDED = 3
    """Steps before a cost counts as known: the fastest of them is one that nothing held up"""
    _GAIN = 0.1
    _MOST_CHANGE = 1.5
    """A step that took longer than that was held up by something else"""
    _HOPE = 0.001
    """What more rows than the last step's cost is believed to have fallen by that share with each step, until they are
    tried again"""
    _MOST_HOPE = 0.5
    _UNKNOWN = 0.3
    """Twice the rows that were ever tried are thought to take that share more"""

    def __init__(self) -> None:
        self._seconds: dict[int, float] = {}
        """By knot"""
        self._num_seen: dict[int, int] = {}
        self._known: list[int] = []
        """Knots seen often enough, in order"""
        self._num_steps = 0
        self._last = 0
        """Knot of the last step"""
        self._last_steps: dict[int, int] = {}
        """By knot: when it was seen last"""

    def is_known(self, num_rows: int) -> bool:
        """Whether steps of about that many rows have been timed often enough."""
        return self._num_seen.get(_knot(num_rows), 0) >= self._NUM_NEEDED

    @property
    def most_rows(self) -> int:
        """Rows to try at most: twice as many as ever were."""
        return 2 * self._known[-1]

    def observe(self, num_rows: int, seconds: float) -> float:
        """Learn from a step; return its seconds, without most of what something else held it up."""
        knot = _knot(num_rows)
        num_seen = self._num_seen.get(knot, 0)
        self._num_steps += 1
        if num_seen < self._NUM_NEEDED:
            self._num_seen[knot] = num_seen + 1
            self._seconds[knot] = min(self._seconds.get(knot, math.inf), seconds)
            if num_seen + 1 == self._NUM_NEEDED:
                bisect.insort(self._known, knot)
        else:
            known = self._seconds[knot]
            seconds = min(seconds, self._MOST_CHANGE * known)
            # The longer ago it was learned, the less it counts.
            self._seconds[knot] += (self._GAIN + self._hope(knot)) * (seconds - known)
        self._last, self._last_steps[knot] = knot, self._num_steps
        return seconds

    def _hope(self, knot: int) -> float:
        """Return the share by which steps of a known size may have become faster since they were seen."""
        return min(self._MOST_HOPE, self._HOPE * (self._num_steps - self._last_steps[knot]))

    def _believed(self, knot: int) -> float:
        return self._seconds[knot] * (1 - self._hope(knot) if knot > self._last else 1)

    def seconds(self, num_rows: int) -> float:
        """Return what a step of ``num_rows`` is expected to take, where one of some size is known."""
        known = self._known
        place = bisect.bisect_left(known, num_rows)
        if not place:
            return self._believed(known[0])
        if place < len(known):
            below, above = known[place - 1], known[place]
            slope = (self._believed(above) - self._believed(below)) / (above - below)
        elif len(known) > 1:
            below, before = known[-1], known[-2]
            slope = max(0.0, (self._believed(below) - self._believed(before)) / (below - before))
        else:
            below = known[0]
            slope = self._UNKNOWN * self._believed(below) / below
        return self._believed(below) + slope * (num_rows - below)


def _knot(num_rows: int) -> int:
    """Return the nearest number of rows whose cost is kept."""
    place = min(bisect.bisect_left(_KNOTS, num_rows), len(_KNOTS) - 1)
    below = _KNOTS[max(place - 1, 0)]
    return _KNOTS[place] if _KNOTS[place] - num_rows <= num_rows - below else below
