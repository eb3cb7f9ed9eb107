"""Blocks and places that are set aside for running sequences, so that what is let in can grow."""

from penstock.engine.kv import CacheManager
from penstock.engine.request import Sequence
from penstock.engine.scheduler.admission import AdmissionPolicy


class Reservations:
    """What the running sequences were promised of the cache, and of the places for sequences to run in."""

    def __init__(self, cache: CacheManager, admission: AdmissionPolicy, step_tokens: int) -> None:
        self._cache = cache
        self._admission = admission
        self._step_tokens = step_tokens
        self.num_blocks = 0
        self.num_places = 0
        """For choices that will be split off"""

    def blocks_for(self, sequence: Sequence) -> int:
        """Return the blocks that a sequence is expected to hold at most, with the choices that will be split off it."""
        request = sequence.request
        if request.sampling.beam is None:
            expected = self._admission.expected_tokens(sequence)
        else:
            # A search that is preempted begins again: it is let in only where it will not be.
            expected = sequence.num_prompt_tokens + request.sampling.max_tokens
        blocks = self._cache.most_blocks_held(expected, self._step_tokens)
        if sequence.is_leader:
            num_own = self._cache.blocks_for(expected) - self._cache.blocks_for(sequence.num_prompt_tokens) + 1
            blocks += (len(request.sequences) - 1) * min(blocks, num_own)
        return blocks

    def fits(self, num_blocks: int) -> bool:
        """Whether that many blocks can be set aside beside what is."""
        return self.num_blocks + num_blocks <= self._cache.pool.num_blocks

    def take(self, sequence: Sequence, num_blocks: int, *, num_shared: int) -> None:
        """Set ``num_blocks`` aside for a sequence that starts to run, less those that it has from others."""
        sequence.num_shared_blocks = num_shared
        sequence.reserved_blocks = max(0, num_blocks - num_shared)
        self.num_blocks += sequence.reserved_blocks
        if sequence.is_leader:
            self.num_places += len(sequence.request.sequences) - 1

    def grow(self, sequence: Sequence) -> None:
        """Set aside what a sequence holds beyond what was promised."""
        outgrown = len(sequence.table.block_ids) - sequence.num_shared_blocks - sequence.reserved_blocks
        if outgrown > 0 and not sequence.is_leader:
            sequence.reserved_blocks += outgrown
            self.num_blocks += outgrown

    def split(self, leader: Sequence) -> None:
        """Give the other choices of a request, which now run beside their leader, their shares of what it was promised.

        All the blocks they begin with are shared.
        """
        twins = leader.request.sequences[1:]
        self.num_places -= len(twins)
        share = leader.reserved_blocks // (len(twins) + 1)
        leader.reserved_blocks -= share * len(twins)
        for twin in twins:
            twin.reserved_blocks = share
            twin.num_shared_blocks = len(twin.table.block_ids)

    def give_back(self, sequence: Sequence) -> None:
        """Promise nothing any more to a sequence that stops running."""
        self.num_blocks -= sequence.reserved_blocks
        sequence.reserved_blocks = 0
        if sequence.is_leader:
            self.num_places -= len(sequence.request.sequences) - 1
