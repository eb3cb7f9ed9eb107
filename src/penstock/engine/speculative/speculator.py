"""Speculation as the engine sees it: drafts before a step, and afterwards what became of them."""

import time
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

from penstock.engine.request import Sequence
from penstock.engine.scheduler import ScheduledBatch
from penstock.engine.speculative.adaptive import DraftLengths
from penstock.engine.speculative.drafter import Drafter

_LEAST_REST = 7
"""Steps that a single stream lets pass as well, after a few in which nothing was guessed"""


@dataclass(slots=True)
class SpeculationCounters:
    """Totals since the start, as ``EngineCounters`` has them."""

    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    decode_s: float = 0.0
    undrafted_decode_s: float = 0.0


class Speculator:
    """One drafter, held to what pays."""

    def __init__(
        self,
        drafter: Drafter,
        *,
        most_tokens: int,
        lengths: DraftLengths | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """A draft has at most ``most_tokens``."""
        self.counters = SpeculationCounters()
        self.lengths = lengths or DraftLengths()
        self._drafter = drafter
        self._most_tokens = most_tokens
        self._clock = clock
        self._grades: dict[int, int] = {}
        """Of the drafts that run, by sequence"""
        self._rest = 0
        """Steps to let pass after one in which nothing was guessed"""
        self._num_resting = 0
        self._is_resting = False
        """In the step that runs"""
        self._drafting_s = 0.0
        self._began_s = 0.0

    def draft(
        self,
        running: SequenceOf[Sequence],
        most_tokens: int,
        num_possible: Callable[[int, SequenceOf[int]], int],
    ) -> dict[int, SequenceOf[int]]:
        """Return guesses at what follows decoding sequences, by id; begins a step.

        most_tokens   all drafts together
        num_possible  how many tokens of a draft can follow a sequence
        """
        self._began_s = self._clock()
        self._is_resting = self._num_resting > 0
        if self._is_resting:
            self._num_resting -= 1
            self._drafting_s = 0.0
            return {}
        self._grades.clear()
        decoding = [sequence for sequence in running if sequence.is_decoding]
        drafts = self._drafts(decoding, most_tokens, num_possible)
        # Looking costs as much for each sequence as for one, and among many there is less to gain.
        self._rest = 0 if drafts else min(2 * self._rest + 1, max(_LEAST_REST, len(decoding) // 2))
        self._num_resting = self._rest
        self._drafting_s = self._clock() - self._began_s
        return drafts

    def _drafts(
        self,
        decoding: SequenceOf[Sequence],
        most_tokens: int,
        num_possible: Callable[[int, SequenceOf[int]], int],
    ) -> dict[int, SequenceOf[int]]:
        offers = []
        for sequence in decoding:
            if sequence.request.sampling.beam is not None:
                continue  # what it goes on with is not drawn
            num_left = sequence.request.sampling.max_tokens - sequence.num_output_tokens - 1
            most = min(num_left, self._most_tokens)
            offer = self._drafter.offer(sequence, most) if most else None
            if offer is not None:
                offers.append(offer)
        lengths = self.lengths.choose(len(decoding), offers, most_tokens) if offers else []
        chosen = [(offer, length) for offer, length in zip(offers, lengths, strict=True) if length]
        if not chosen:
            return {}
        began_s = self._clock()
        guesses = self._drafter.draft(chosen)
        self.lengths.drafted(max(length for _, length in chosen), self._clock() - began_s)
        drafts: dict[int, SequenceOf[int]] = {}
        for (offer, _), guess in zip(chosen, guesses, strict=True):
            sequence_id = offer.sequence.id
            possible = guess[: num_possible(sequence_id, guess)]
            if possible:
                drafts[sequence_id] = possible
                self._grades[sequence_id] = offer.grade
        return drafts

    def verified(self, sequence_id: int, num_drafted: int, num_accepted: int) -> None:
        """Take note of what came true of a draft."""
        self.counters.num_drafts += 1
        self.counters.num_draft_tokens += num_drafted
        self.counters.num_accepted_tokens += num_accepted
        self.lengths.verified(sequence_id, self._grades[sequence_id], num_drafted, num_accepted)

    def stepped(self, batch: ScheduledBatch, num_new_tokens: int) -> None:
        """Take note of a step's end, if all its sequences decoded; ``num_new_tokens`` came of it."""
        costs, counters = self.lengths.costs, self.counters
        seconds = self._clock() - self._began_s - self._drafting_s
        if self._is_resting:
            # The steps in between teach enough, and learning takes its time as well.
            counters.decode_s += seconds
            counters.undrafted_decode_s += seconds
            return
        num_sequences = len(batch.sequence_ids)
        seconds = costs.observe(batch.num_tokens, seconds)
        counters.decode_s += seconds + self._drafting_s
        if batch.drafts and costs.is_known(num_sequences):
            seconds = num_new_tokens / num_sequences * costs.seconds(num_sequences)
        counters.undrafted_decode_s += seconds

    def remove(self, sequence_id: int) -> None:
        """Forget a sequence; unknown ones are ignored."""
        self._drafter.remove(sequence_id)
        self.lengths.remove(sequence_id)
