"""What a sequence may ask of the cache: room to grow, a prefix to reuse, a fork, its end."""

from collections.abc import Sequence

from penstock.engine.kv.block_pool import BlockPool
from penstock.engine.kv.block_table import BlockTable
from penstock.engine.kv.prefix import PrefixHasher, seen_in
from penstock.protocol import Picture

BlockCopy = tuple[int, int]
"""(from, to): copy the whole block before the step writes."""


class CacheManager:
    """Block tables over one pool. P tokens per block."""

    def __init__(
        self, pool: BlockPool, *, block_size: int, prefix_caching: bool = True, window: int | None = None
    ) -> None:
        self.pool = pool
        self.block_size = block_size
        self.window = window
        """Tokens that every layer can look back, the current one included; None where any layer sees all."""
        self._prefix_caching = prefix_caching
        self._hasher = PrefixHasher()

    def blocks_for(self, num_tokens: int) -> int:
        """Return how many blocks ``num_tokens`` take."""
        return -(-num_tokens // self.block_size)

    def most_blocks_held(self, num_tokens: int, step_tokens: int) -> int:
        """Return the most blocks a sequence holds at once while it grows to ``num_tokens``.

        With a sliding window that is the window and one step's chunk, each of which may straddle a block.
        """
        blocks = self.blocks_for(num_tokens)
        if self.window is None:
            return blocks
        return min(blocks, self.blocks_for(self.window + step_tokens) + 1)

    def open(
        self, token_ids: Sequence[int], salt: str, *, most: int | None = None, pictures: Sequence[Picture] = ()
    ) -> tuple[BlockTable, int]:
        """Return a table that shares the cached blocks ``token_ids`` begins with, and how many tokens they hold.

        At least the last token is left to compute, since its logits are wanted, and no more than ``most`` are shared.
        Where ``pictures`` are, the same ones have to be.
        """
        table = BlockTable()
        table.chain = self._hasher.root(salt)
        if not self._prefix_caching:
            return table, 0
        size = self.block_size
        most = len(token_ids) - 1 if most is None else min(most, len(token_ids) - 1)
        for start in range(0, most - size + 1, size):
            seen = seen_in(pictures, start, start + size) if pictures else b""
            name = self._hasher.block(table.chain, token_ids[start : start + size], seen)
            block = self.pool.find(name)
            if block is None:
                break
            self.pool.acquire(block)
            table.block_ids.append(block)
            table.chain = name
        table.num_registered = len(table.block_ids)
        num_cached = len(table.block_ids) * size
        self.drop_outside_window(table, num_cached)
        return table, num_cached

    def grow(self, table: BlockTable, num_computed: int, num_tokens: int) -> list[BlockCopy] | None:
        """Make positions ``num_computed .. num_tokens - 1`` writable.

        Returns the copies to make before writing (a block shared with a fork is replaced by an own one), or None,
        with nothing changed, when the pool has too few blocks.
        """
        missing = self.blocks_for(num_tokens) - len(table)
        shared = self.is_shared(table, num_computed)
        if missing + shared > self.pool.num_free:
            return None
        copies: list[BlockCopy] = []
        if shared:
            # Only the block the next token goes to can be both shared and written: later ones are this table's own.
            first = num_computed // self.block_size - table.num_dropped
            source, target = table.block_ids[first], self.pool.allocate()
            copies.append((source, target))
            table.block_ids[first] = target
            self.pool.release(source)
        for _ in range(missing):
            table.block_ids.append(self.pool.allocate())
        return copies

    def has_room(self, table: BlockTable, num_tokens: int, *, spare: int) -> bool:
        """Whether ``table`` could grow to ``num_tokens`` and leave ``spare`` blocks to others."""
        return self.blocks_for(num_tokens) - len(table) + spare <= self.pool.num_free

    def is_shared(self, table: BlockTable, position: int) -> bool:
        """Whether the block of ``position``, if there is one yet, is a fork's as well."""
        place = position // self.block_size - table.num_dropped
        return place < len(table.block_ids) and self.pool.references(table.block_ids[place]) > 1

    def trim(self, table: BlockTable, num_tokens: int) -> None:
        """Give back the blocks behind the first ``num_tokens``, where nothing came true."""
        while len(table) > self.blocks_for(num_tokens):
            self.pool.release(table.block_ids.pop())

    def commit(
        self, table: BlockTable, token_ids: Sequence[int], num_computed: int, pictures: Sequence[Picture] = ()
    ) -> None:
        """Name the blocks that ``num_computed`` tokens have filled, and give back those outside the window."""
        size = self.block_size
        if self._prefix_caching:
            while (table.num_registered + 1) * size <= num_computed:
                start = table.num_registered * size
                seen = seen_in(pictures, start, start + size) if pictures else b""
                name = self._hasher.block(table.chain, token_ids[start : start + size], seen)
                block = table.block_ids[table.num_registered - table.num_dropped]
                self.pool.register(block, name, table.chain)
                table.chain = name
                table.num_registered += 1
        if self.window is not None:
            self.drop_outside_window(table, num_computed)

    def drop_outside_window(self, table: BlockTable, num_computed: int) -> None:
        """Release the blocks that no token from position ``num_computed`` on can see."""
        if self.window is None:
            return
        num_gone = max(0, num_computed - self.window + 1) // self.block_size - table.num_dropped
        for block in table.block_ids[: max(0, num_gone)]:
            self.pool.release(block)
        if num_gone > 0:
            del table.block_ids[:num_gone]
            table.num_dropped += num_gone

    def fork(self, table: BlockTable) -> BlockTable:
        """Return a second table over the same blocks; the first of the two to write makes its own copy."""
        twin = BlockTable()
        twin.block_ids = table.block_ids[:]
        twin.num_dropped = table.num_dropped
        twin.num_registered = table.num_registered
        twin.chain = table.chain
        for block in twin.block_ids:
            self.pool.acquire(block)
        return twin

    def num_private(self, table: BlockTable) -> int:
        """Return how many blocks would become free if ``table`` were closed."""
        references = self.pool.references
        return sum(1 for block in table.block_ids if references(block) == 1)

    def close(self, table: BlockTable) -> None:
        """Give all blocks back; what was registered stays findable until it is evicted."""
        for block in reversed(table.block_ids):
            self.pool.release(block)
        del table.block_ids[:]
