"""A fixed number of cache blocks, each counted by its owners and, when full, remembered by its hash."""

import heapq


class BlockPool:
    """Who owns which of N blocks.

    A block is *held* (reference count above zero), *cached* (nobody holds it, its hash may be found again and it
    may be evicted) or *empty*. ``num_free`` counts the last two. Eviction takes the least recently released
    block that no other cached block builds upon; only where every candidate has such a successor, because a
    window slid past the candidate while the sequence runs on, does it take the least recently released one.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.num_evicted_blocks = 0
        self._references = [0] * num_blocks
        self._empty = list(range(num_blocks - 1, -1, -1))
        self._hashes: list[bytes | None] = [None] * num_blocks
        self._parents: list[bytes] = [b""] * num_blocks
        self._blocks_by_hash: dict[bytes, int] = {}
        self._num_successors: dict[bytes, int] = {}
        self._num_cached = 0
        # Heaps of (release stamp, block). An entry is stale once the block was held or released again.
        self._leaves: list[tuple[int, int]] = []
        self._inner: list[tuple[int, int]] = []
        self._stamps = [0] * num_blocks
        self._next_stamp = 1

    @property
    def num_free(self) -> int:
        """Blocks that ``allocate`` can hand out now."""
        return len(self._empty) + self._num_cached

    @property
    def num_cached(self) -> int:
        """Blocks that nobody holds and that a prefix lookup can still find."""
        return self._num_cached

    def references(self, block: int) -> int:
        """Return how many owners hold ``block``."""
        return self._references[block]

    def name(self, block: int) -> bytes | None:
        """Return the hash that a block was registered under, if it was."""
        return self._hashes[block]

    def allocate(self) -> int:
        """Hand out a block with one owner; the caller has checked ``num_free``."""
        block = self._empty.pop() if self._empty else self._evict()
        self._references[block] = 1
        return block

    def acquire(self, block: int) -> None:
        """Add an owner to a block that is held or cached."""
        if self._references[block] == 0:
            assert self._hashes[block] is not None, "an empty block cannot be shared"
            self._num_cached -= 1
        self._references[block] += 1

    def release(self, block: int) -> None:
        """Take one owner away. Release a sequence's last block first, so that prefixes outlive their ends."""
        assert self._references[block] > 0, "a block was released more often than acquired"
        self._references[block] -= 1
        if self._references[block]:
            return
        block_hash = self._hashes[block]
        if block_hash is None:
            self._empty.append(block)
            return
        self._num_cached += 1
        self._stamps[block] = self._next_stamp
        self._next_stamp += 1
        heap = self._inner if self._num_successors.get(block_hash) else self._leaves
        heapq.heappush(heap, (self._stamps[block], block))
        if len(heap) > 2 * self.num_blocks + 64:
            heap[:] = [entry for entry in heap if self._is_candidate(*entry)]
            heapq.heapify(heap)

    def register(self, block: int, block_hash: bytes, parent: bytes) -> None:
        """Make a full, held block findable. If another block already has that content, this one stays private."""
        if self._hashes[block] is not None or block_hash in self._blocks_by_hash:
            return
        self._hashes[block] = block_hash
        self._parents[block] = parent
        self._blocks_by_hash[block_hash] = block
        self._num_successors[parent] = self._num_successors.get(parent, 0) + 1

    def find(self, block_hash: bytes) -> int | None:
        """Return the block of that hash, held or cached, or None."""
        return self._blocks_by_hash.get(block_hash)

    def clear_cache(self) -> None:
        """Forget every cached block; held ones stay findable."""
        while self._num_cached:
            self._empty.append(self._evict())

    def _is_candidate(self, stamp: int, block: int) -> bool:
        return self._stamps[block] == stamp and not self._references[block] and self._hashes[block] is not None

    def _evict(self) -> int:
        block = self._pop(self._leaves, leaves_only=True)
        if block is None:
            block = self._pop(self._inner, leaves_only=False)
        assert block is not None, "eviction was asked of a pool with nothing to evict"
        block_hash, parent = self._hashes[block], self._parents[block]
        assert block_hash is not None
        del self._blocks_by_hash[block_hash]
        self._hashes[block] = None
        self._num_cached -= 1
        self.num_evicted_blocks += 1
        left = self._num_successors[parent] - 1
        if left:
            self._num_successors[parent] = left
        else:
            del self._num_successors[parent]
            parent_block = self._blocks_by_hash.get(parent)
            if parent_block is not None and not self._references[parent_block]:
                heapq.heappush(self._leaves, (self._stamps[parent_block], parent_block))
        return block

    def _pop(self, heap: list[tuple[int, int]], *, leaves_only: bool) -> int | None:
        while heap:
            stamp, block = heapq.heappop(heap)
            if not self._is_candidate(stamp, block):
                continue
            block_hash = self._hashes[block]
            assert block_hash is not None
            if leaves_only and self._num_successors.get(block_hash):
                # It gained a successor since: it comes back as a leaf when that one goes.
                heapq.heappush(self._inner, (stamp, block))
                continue
            return block
        return None
