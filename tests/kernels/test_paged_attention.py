"""Paged attention of every backend against attention written out, over odd sizes, with poison where nobody wrote."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from penstock.errors import KernelUnsupported
from penstock.kernels import BatchLayout, CPUOps, KVBlocks, Ops, ReferenceOps
from penstock.kernels.dtypes import dtype_name, torch_dtype
from penstock.kernels.native import IN_PAIRS
from penstock.kernels.rope_write_kv.reference import write_kv
from tests.kernels.backends import by_slot, instruction_sets, needs_native, numbers, poisoned_cache, using
from tests.packing import layout_of

BACKENDS = [
    *(
        pytest.param(ReferenceOps(), None, dtype, id=f"reference-{dtype}")
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.int8)
    ),
    *(
        pytest.param(CPUOps(), isa, dtype, id=f"{isa}-{dtype}")
        for isa in instruction_sets()
        for dtype in (torch.float32, torch.bfloat16, torch.int8)
    ),
]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2, torch.int8: 1e-5}
"""Of activations in a dtype; what codes of 8 bits lost is not in it, because both sides read the same codes"""


def tolerance(isa: str | None, dtype: torch.dtype) -> float:
    """Return how far a backend with such a cache may be off, where values are about 1."""
    if isa is None or dtype is not torch.bfloat16:
        return TOLERANCE[dtype]
    # Compiled attention is in float32, but that queries and weights are rounded for products of pairs.
    return 2e-2 if isa in IN_PAIRS else TOLERANCE[torch.float32]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A packed step over a cache whose unwritten slots hold NaN."""

    layout: BatchLayout
    q: Tensor
    kv: KVBlocks
    histories: list[tuple[Tensor, Tensor]]
    """Each sequence's keys and values [context, G, D], as the cache has them; zeros where it has them no longer"""


def make_case(
    ops: Ops,
    sequences: list[tuple[int, int]],
    *,
    heads: tuple[int, int] = (4, 2),
    head_dim: int = 16,
    block_size: int = 4,
    window: int | None = None,
    dtype: torch.dtype = torch.float32,
    isa: str | None = None,
    seed: int = 0,
) -> Case:
    """Return a case of (new tokens, context) sequences. With a window, blocks that slid out are not in the tables."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    H, G = heads
    num_blocks = sum(-(-context // block_size) for _, context in sequences) + 3
    free = torch.randperm(num_blocks, generator=generator).tolist()
    kv = poisoned_cache(ops, num_blocks, block_size, G, head_dim, dtype)
    views = by_slot(ops, isa, kv)
    tables, starts, slots = [], [], []
    for query, context in sequences:
        first_visible = 0 if window is None else max(0, context - query + 1 - window)
        start = first_visible // block_size * block_size
        table = [free.pop() for _ in range(-(-(context - start) // block_size))]
        tables.append(table)
        starts.append(start)
        offsets = torch.arange(context - start)
        slots.append(torch.tensor(table)[offsets // block_size] * block_size + offsets % block_size)
    # Written as the reference writes, into tensors of its order, and from there to where the backend has them.
    written = poisoned_cache(ReferenceOps(), num_blocks, block_size, G, head_dim, dtype)
    for places in slots:
        write_kv(written, places, random(len(places), G, head_dim), random(len(places), G, head_dim))
    for view, tensor in zip(views.tensors(), written.tensors(), strict=True):
        view.copy_(tensor.view(view.shape))
    histories = []
    for places, start in zip(slots, starts, strict=True):
        k, v = (
            torch.cat([torch.zeros(start, G, head_dim), cache.flatten(0, 1)[places]]) for cache in numbers(ops, isa, kv)
        )
        histories.append((k, v))
    of_queries = "float32" if dtype is torch.int8 else ops.activation_dtype(dtype_name(dtype))
    queries, contexts = [query for query, _ in sequences], [context for _, context in sequences]
    return Case(
        layout=layout_of(queries, contexts, tables, block_size, starts),
        q=random(sum(queries), H, head_dim).to(torch_dtype(of_queries)),
        kv=kv,
        histories=histories,
    )


def written_out(case: Case, window: int | None, scale: float, cap: float | None = None) -> Tensor:
    """Return attention token by token and head by head, in float64."""

    def rows() -> Iterator[Tensor]:
        row = 0
        for (k, v), query, context in zip(
            case.histories, case.layout.query_lens_list, case.layout.context_lens_list, strict=True
        ):
            group_size = case.q.shape[1] // k.shape[1]
            for position in range(context - query, context):
                end = position + 1 if case.layout.visible is None else int(case.layout.visible[row])
                seen = slice(0 if window is None else max(0, position + 1 - window), end)
                keys = k[seen].double().repeat_interleave(group_size, 1)
                values = v[seen].double().repeat_interleave(group_size, 1)
                scores = torch.einsum("hd,lhd->hl", case.q[row].double(), keys).mul(scale)
                if cap is not None:
                    scores = (scores / cap).tanh() * cap
                yield torch.einsum("hl,lhd->hd", scores.softmax(-1), values)
                row += 1

    return torch.stack(list(rows()))


def attend(ops: Ops, case: Case, window: int | None, scale: float = 0.25, cap: float | None = None) -> Tensor:
    """Return what ``ops`` makes of the case."""
    H, G, D = case.q.shape[1], case.histories[0][0].shape[1], case.q.shape[2]
    with torch.inference_mode():
        attention = ops.plan_attention(
            case.layout, num_heads=H, num_kv_heads=G, head_dim=D, window=window, score_cap=cap
        )
        return attention(case.q, case.kv, scale=scale)


BATCHES = {
    "one decode": [(1, 9)],
    "first token": [(1, 1)],
    "whole prompt": [(11, 11)],
    "chunk": [(5, 13)],
    "two new tokens": [(2, 2), (2, 30)],
    "decodes of all lengths": [(1, 1 + 7 * i % 61) for i in range(33)],
    "one long among short": [(1, 3), (1, 150), (1, 4), (1, 5)],
    "full blocks": [(1, 8), (1, 4), (4, 4), (4, 8)],
    "several spans": [(1, 700), (9, 520), (300, 300)],
    "mixed": [(1, 5), (7, 7), (1, 40), (3, 20), (1, 1), (16, 33)],
    "many rows": [(40, 300)],
}


@pytest.mark.parametrize("block_size", [4, 16])
@pytest.mark.parametrize("window", [None, 1, 6, 8, 64])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize(("ops", "isa", "dtype"), BACKENDS)
def test_equals_attention_written_out(
    ops: Ops, isa: str | None, dtype: torch.dtype, batch: str, window: int | None, block_size: int
) -> None:
    case = make_case(ops, BATCHES[batch], block_size=block_size, dtype=dtype, isa=isa, window=window)
    expected = written_out(case, window, 0.25)
    with using(isa, 2):
        out = attend(ops, case, window)
    assert out.dtype is case.q.dtype
    torch.testing.assert_close(out.double(), expected, atol=tolerance(isa, dtype), rtol=0)


@pytest.mark.parametrize("block_size", [1, 3, 16, 48])
@pytest.mark.parametrize("heads", [(1, 1), (3, 3), (6, 2), (14, 2), (8, 1)])
@pytest.mark.parametrize("head_dim", [2, 24, 80, 128])
@pytest.mark.parametrize(("ops", "isa", "dtype"), BACKENDS)
def test_odd_shapes(
    ops: Ops, isa: str | None, dtype: torch.dtype, heads: tuple[int, int], head_dim: int, block_size: int
) -> None:
    sequences = [(1, 17), (6, 18), (1, 2), (9, 9), (1, 70)]
    case = make_case(ops, sequences, heads=heads, head_dim=head_dim, block_size=block_size, dtype=dtype, isa=isa)
    scale = head_dim**-0.5
    expected = written_out(case, None, scale)
    with using(isa):
        out = attend(ops, case, None, scale)
    torch.testing.assert_close(out.double(), expected, atol=tolerance(isa, dtype), rtol=0)


@pytest.mark.parametrize(("ops", "isa", "dtype"), BACKENDS)
def test_large_scores_neither_overflow_nor_vanish(ops: Ops, isa: str | None, dtype: torch.dtype) -> None:
    case = make_case(ops, [(1, 9), (4, 9), (1, 30)], block_size=16, dtype=dtype, isa=isa)
    with using(isa):
        out = attend(ops, case, None, scale=40.0)
    torch.testing.assert_close(out.double(), written_out(case, None, 40.0), atol=10 * tolerance(isa, dtype), rtol=0)


@pytest.mark.parametrize("cap", [0.3, 2.0, 50.0])
@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize(("ops", "isa", "dtype"), BACKENDS)
def test_capped_scores(ops: Ops, isa: str | None, dtype: torch.dtype, window: int | None, cap: float) -> None:
    case = make_case(ops, BATCHES["mixed"], block_size=16, dtype=dtype, isa=isa, window=window)
    with using(isa, 2):
        out = attend(ops, case, window, 2.0, cap)
    expected = written_out(case, window, 2.0, cap)
    torch.testing.assert_close(out.double(), expected, atol=2 * tolerance(isa, dtype), rtol=0)


@pytest.mark.parametrize("block_size", [4, 16])
@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize(("ops", "isa", "dtype"), BACKENDS)
def test_rows_that_see_beyond_themselves(
    ops: Ops, isa: str | None, dtype: torch.dtype, batch: str, window: int | None, block_size: int
) -> None:
    case = make_case(ops, BATCHES[batch], block_size=block_size, dtype=dtype, isa=isa, window=window)
    generator = torch.Generator().manual_seed(1)

    def some_of(query: int, context: int) -> Tensor:
        own = torch.arange(context - query, context) + 1
        beyond = torch.rand(query, generator=generator) < 0.3
        return (own + beyond * ((context - own) * torch.rand(query, generator=generator)).int()).cummax(0).values

    all_of = [torch.full((query,), context) for query, context in BATCHES[batch]]
    for ends in (all_of, [some_of(*sequence) for sequence in BATCHES[batch]]):
        seeing = replace(case, layout=replace(case.layout, visible=torch.cat(ends).int()))
        with using(isa, 2):
            out = attend(ops, seeing, window)
        expected = written_out(seeing, window, 0.25)
        torch.testing.assert_close(out.double(), expected, atol=tolerance(isa, dtype), rtol=0)


@needs_native
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("block_size", [4, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize(("heads", "head_dim"), [((6, 2), 16), ((7, 1), 64)])
@pytest.mark.parametrize("isa", instruction_sets())
def test_no_bit_depends_on_neighbours_chunks_or_threads(
    isa: str, heads: tuple[int, int], head_dim: int, dtype: torch.dtype, block_size: int, window: int | None
) -> None:
    ops, context, (H, G) = CPUOps(), 600, heads
    case = make_case(
        ops, [(context, context)], heads=heads, head_dim=head_dim, block_size=block_size, dtype=dtype, isa=isa
    )
    table = case.layout.tables[0].tolist()

    def attend_parts(sizes: list[int], num_threads: int) -> Tensor:
        outs, end = [], 0
        for size in sizes:
            end += size
            # A stranger on either side: shorter, longer, and never the same size twice.
            layout = layout_of(
                [1, size, 2], [1 + end % 37, end, 2 + end % 300], [table, table, table], block_size, None
            )
            q = torch.cat([case.q[:1], case.q[end - size : end], case.q[:2]])
            with using(isa, num_threads), torch.inference_mode():
                attention = ops.plan_attention(layout, num_heads=H, num_kv_heads=G, head_dim=head_dim, window=window)
                outs.append(attention(q, case.kv, scale=0.25)[1:-2])
        return torch.cat(outs)

    with using(isa):
        whole = attend(ops, case, window)
    for sizes in ([7] * 85 + [5], [1] * 600, [256, 1, 343], [599, 1]):
        for num_threads in (1, 4):
            assert torch.equal(attend_parts(sizes, num_threads), whole)
    # A token alone: threads share out the query heads of a KV head too, where there are few spans.
    for end in (1, 77, 256, 257, 513, 600):
        for num_threads in (3, 8):
            layout = layout_of([1], [end], [table], block_size, None)
            with using(isa, num_threads), torch.inference_mode():
                attention = ops.plan_attention(layout, num_heads=H, num_kv_heads=G, head_dim=head_dim, window=window)
                assert torch.equal(attention(case.q[end - 1 : end], case.kv, scale=0.25), whole[end - 1 : end])


@needs_native
def test_too_many_heads_on_one_are_refused() -> None:
    case = make_case(CPUOps(), [(1, 3)], heads=(129, 1))
    with pytest.raises(KernelUnsupported, match="129 query heads share a KV head"):
        attend(CPUOps(), case, None)
