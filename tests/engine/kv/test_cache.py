"""Blocks: who holds them, who finds them again, who loses them first."""

from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.engine.kv import BlockPool, BlockTable, CacheManager

P = 4


def manager(num_blocks: int = 16, window: int | None = None) -> CacheManager:
    return CacheManager(BlockPool(num_blocks), block_size=P, window=window)


def compute(cache: CacheManager, tokens: list[int], salt: str = "") -> tuple[BlockTable, int]:
    """Compute all of ``tokens`` and return the table and how many were cached."""
    table, num_cached = cache.open(tokens, salt)
    assert cache.grow(table, num_cached, len(tokens)) is not None
    cache.commit(table, tokens, len(tokens))
    return table, num_cached


def test_a_prefix_is_found_by_its_whole_chain() -> None:
    cache = manager()
    first = list(range(10))
    table, _ = compute(cache, first)
    cache.close(table)
    assert compute(cache, first)[1] == 8
    assert compute(cache, [*first[:8], 99, 99])[1] == 8
    assert compute(cache, [99, *first[1:]])[1] == 0, "the second block is not the same behind another first"
    assert compute(cache, first[:8])[1] == 4, "one token is always left to compute"
    assert compute(cache, first, salt="other")[1] == 0


def test_the_ends_of_prefixes_are_evicted_before_their_beginnings() -> None:
    cache = manager(num_blocks=6)
    table, _ = compute(cache, list(range(24)))
    cache.close(table)
    # Two blocks are needed: the last two of the chain go.
    other, _ = compute(cache, [77] * 8)
    cache.close(other)
    assert cache.pool.num_evicted_blocks == 2
    assert cache.open(list(range(24)), "")[1] == 16


def test_what_was_used_last_is_evicted_last() -> None:
    cache = manager(num_blocks=4)
    for start in (0, 100, 200):
        table, _ = compute(cache, list(range(start, start + P)))
        cache.close(table)
    refreshed, num_cached = cache.open([0, 1, 2, 3, 50], "")
    assert num_cached == P
    cache.close(refreshed)
    table, _ = compute(cache, [9] * 8)
    assert cache.open([0, 1, 2, 3, 50], "")[1] == P
    assert cache.open([100, 101, 102, 103, 50], "")[1] == 0


def test_a_fork_copies_only_the_block_it_writes() -> None:
    cache = manager()
    table, _ = compute(cache, list(range(10)))
    twin = cache.fork(table)
    assert cache.pool.num_free == 13
    copies = cache.grow(twin, 10, 11)
    assert copies == [(table.block_ids[2], twin.block_ids[2])]
    assert table.block_ids[:2] == twin.block_ids[:2]
    assert cache.grow(table, 10, 11) == [], "the last holder writes in place"
    cache.close(table)
    cache.close(twin)
    assert cache.pool.num_free == 16


def test_a_window_gives_back_what_slid_out() -> None:
    cache = manager(num_blocks=8, window=6)
    table, tokens = BlockTable(), list(range(100))
    most = 0
    for position in range(60):
        assert cache.grow(table, position, position + 1) is not None
        cache.commit(table, tokens, position + 1)
        most = max(most, len(table.block_ids))
    assert most <= cache.most_blocks_held(60, 1) == 3
    assert len(table) == 15
    cache.close(table)
    assert cache.pool.num_free == 8


def test_equal_blocks_computed_side_by_side_are_named_once() -> None:
    cache = manager()
    tokens = list(range(8))
    one, other = BlockTable(), BlockTable()
    for table in (one, other):
        table.chain = cache.open([], "")[0].chain
        cache.grow(table, 0, 8)
    for table in (one, other):
        cache.commit(table, tokens, 8)
    cache.close(one)
    cache.close(other)
    assert cache.pool.num_cached == 2
    assert cache.pool.num_free == 16


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4), st.integers(1, 20)), max_size=60))
def test_no_block_is_lost_or_owned_twice(operations: list[tuple[int, int, int]]) -> None:
    cache = manager(num_blocks=12)
    open_tables: list[tuple[BlockTable, list[int]]] = []
    for kind, which, size in operations:
        match kind:
            case 0:
                tokens = [which] * size
                table, num_cached = cache.open(tokens, "")
                if cache.grow(table, num_cached, size) is None:
                    cache.close(table)
                else:
                    cache.commit(table, tokens, size)
                    open_tables.append((table, tokens))
            case 1 if open_tables:
                table, tokens = open_tables[which % len(open_tables)]
                if cache.grow(table, len(tokens), len(tokens) + size) is not None:
                    tokens.extend([size] * size)
                    cache.commit(table, tokens, len(tokens))
            case 2 if open_tables:
                table, tokens = open_tables[which % len(open_tables)]
                open_tables.append((cache.fork(table), list(tokens)))
            case 3 if open_tables:
                cache.close(open_tables.pop(which % len(open_tables))[0])
        owners = [0] * 12
        for table, _ in open_tables:
            for block in table.block_ids:
                owners[block] += 1
        assert owners == [cache.pool.references(block) for block in range(12)]
        assert cache.pool.num_free == owners.count(0)
    for table, _ in open_tables:
        cache.close(table)
    assert cache.pool.num_free == 12
    cache.pool.clear_cache()
    assert sorted(cache.pool.allocate() for _ in range(12)) == list(range(12))
