"""Paged attention of every backend against attention written out, over odd sizes, with poison where nobody wrote."""

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from penstock.kernels import BatchLayout, CPUOps, KVBlocks, Ops, ReferenceOps
from tests.packing import layout_of

BACKENDS = [
    pytest.param(ReferenceOps(), torch.float32, id="reference-float32"),
    pytest.param(ReferenceOps(), torch.bfloat16, id="reference-bfloat16"),
    pytest.param(ReferenceOps(), torch.float16, id="reference-float16"),
    pytest.param(CPUOps(), torch.float32, id="cpu-float32"),
]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A packed step over a cache whose unwritten slots hold NaN."""

    layout: BatchLayout
    q: Tensor
    k: Tensor
    v: Tensor
    kv: KVBlocks
    histories: list[tuple[Tensor, Tensor]]
    """Each sequence's keys and values [context, G, D], as dense tensors"""


def make_case(
    sequences: list[tuple[int, int]],
    *,
    heads: tuple[int, int] = (4, 2),
    head_dim: int = 16,
    block_size: int = 4,
    window: int | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Case:
    """Return a case of (new tokens, context) sequences. With a window, blocks that slid out are not in the tables."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    H, G = heads
    num_blocks = sum(-(-context // block_size) for _, context in sequences) + 3
    free = torch.randperm(num_blocks, generator=generator).tolist()
    shape = (num_blocks, block_size, G, head_dim)
    kv = KVBlocks(torch.full(shape, torch.nan, dtype=dtype), torch.full(shape, torch.nan, dtype=dtype))
    tables, starts, histories = [], [], []
    for query, context in sequences:
        first_visible = 0 if window is None else max(0, context - query + 1 - window)
        start = first_visible // block_size * block_size
        table = [free.pop() for _ in range(-(-(context - start) // block_size))]
        k, v = random(context, G, head_dim), random(context, G, head_dim)
        for position in range(start, context):
            place = (table[(position - start) // block_size], (position - start) % block_size)
            kv.k[place], kv.v[place] = k[position], v[position]
        tables.append(table)
        starts.append(start)
        histories.append((k, v))
    queries, contexts = [query for query, _ in sequences], [context for _, context in sequences]
    return Case(
        layout=layout_of(queries, contexts, tables, block_size, starts),
        q=random(sum(queries), H, head_dim),
        k=torch.cat([k[-query:] for (k, _), query in zip(histories, queries, strict=True)]),
        v=torch.cat([v[-query:] for (_, v), query in zip(histories, queries, strict=True)]),
        kv=kv,
        histories=histories,
    )


def written_out(case: Case, window: int | None, scale: float) -> Tensor:
    """Return attention token by token and head by head, in float64."""

    def rows() -> Iterator[Tensor]:
        row = 0
        for (k, v), query, context in zip(
            case.histories, case.layout.query_lens_list, case.layout.context_lens_list, strict=True
        ):
            group_size = case.q.shape[1] // k.shape[1]
            for position in range(context - query, context):
                seen = slice(0 if window is None else max(0, position + 1 - window), position + 1)
                keys = k[seen].double().repeat_interleave(group_size, 1)
                values = v[seen].double().repeat_interleave(group_size, 1)
                weights = torch.einsum("hd,lhd->hl", case.q[row].double(), keys).mul(scale).softmax(-1)
                yield torch.einsum("hl,lhd->hd", weights, values)
                row += 1

    return torch.stack(list(rows()))


def attend(ops: Ops, case: Case, window: int | None, scale: float = 0.25) -> Tensor:
    """Return what ``ops`` makes of the case."""
    with torch.inference_mode():
        attention = ops.plan_attention(case.layout, case.kv, num_heads=case.q.shape[1], window=window)
        return attention(case.q, case.k, case.v, case.kv, scale=scale)


BATCHES = {
    "one decode": [(1, 9)],
    "first token": [(1, 1)],
    "whole prompt": [(11, 11)],
    "chunk": [(5, 13)],
    "two new tokens": [(2, 2), (2, 30)],
    "decodes of all lengths": [(1, 1 + 7 * i % 61) for i in range(33)],
    "one long among short": [(1, 3), (1, 150), (1, 4), (1, 5)],
    "full blocks": [(1, 8), (1, 4), (4, 4), (4, 8)],
    "mixed": [(1, 5), (7, 7), (1, 40), (3, 20), (1, 1), (16, 33)],
}


@pytest.mark.parametrize("window", [None, 1, 6, 8, 64])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize(("ops", "dtype"), BACKENDS)
def test_equals_attention_written_out(ops: Ops, dtype: torch.dtype, batch: str, window: int | None) -> None:
    case = make_case(BATCHES[batch], dtype=dtype, window=window)
    expected = written_out(case, window, 0.25)
    out = attend(ops, case, window)
    assert out.dtype is dtype
    torch.testing.assert_close(out.double(), expected, atol=TOLERANCE[dtype], rtol=0)


@pytest.mark.parametrize("block_size", [1, 3, 16])
@pytest.mark.parametrize("heads", [(1, 1), (3, 3), (6, 2), (8, 1)])
@pytest.mark.parametrize("head_dim", [2, 24, 128])
@pytest.mark.parametrize(("ops", "dtype"), BACKENDS)
def test_odd_shapes(ops: Ops, dtype: torch.dtype, heads: tuple[int, int], head_dim: int, block_size: int) -> None:
    sequences = [(1, 17), (6, 18), (1, 2), (9, 9)]
    case = make_case(sequences, heads=heads, head_dim=head_dim, block_size=block_size, dtype=dtype)
    scale = head_dim**-0.5
    expected = written_out(case, None, scale)
    torch.testing.assert_close(attend(ops, case, None, scale).double(), expected, atol=TOLERANCE[dtype], rtol=0)


@pytest.mark.parametrize(("ops", "dtype"), BACKENDS)
def test_large_scores_neither_overflow_nor_vanish(ops: Ops, dtype: torch.dtype) -> None:
    case = make_case([(1, 9), (4, 9), (1, 30)], dtype=dtype)
    out = attend(ops, case, None, scale=40.0)
    torch.testing.assert_close(out.double(), written_out(case, None, 40.0), atol=10 * TOLERANCE[dtype], rtol=0)


@pytest.mark.parametrize("ops", [ReferenceOps(), CPUOps()], ids=["reference", "cpu"])
def test_neighbours_change_nothing(ops: Ops) -> None:
    strangers = [(1, 1 + 13 * i % 90) for i in range(31)]
    alone = make_case([(1, 37)], seed=1)
    crowd = make_case([(1, 37), *strangers], seed=1)
    # The same first sequence: the same query, and the same history at its place in the other cache.
    crowd.q[0] = alone.q[0]
    k, v = alone.histories[0]
    for position in range(37):
        place = (int(crowd.layout.tables[0, position // 4]), position % 4)
        crowd.kv.k[place], crowd.kv.v[place] = k[position], v[position]
    torch.testing.assert_close(attend(ops, crowd, None)[0], attend(ops, alone, None)[0], atol=1e-6, rtol=0)


def test_backends_build_no_graph_and_raise_no_warning_outside_inference_mode() -> None:
    case = make_case([(1, 9), (3, 7)])
    attention = CPUOps().plan_attention(case.layout, case.kv, num_heads=4, window=None)
    assert not attention(case.q, case.k, case.v, case.kv, scale=1.0).requires_grad
