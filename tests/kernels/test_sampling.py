"""Sampling against the plainest reading of it in float64: sort, cut, add up, and see where the number falls."""

from typing import Any

import numpy as np
import pytest
import torch

from penstock.errors import KernelUnsupported
from penstock.kernels.native import NATIVE
from penstock.kernels.sampling import DrawRow, cpu, reference
from tests.kernels.backends import instruction_sets, needs_native, using

BACKENDS = ["torch", *instruction_sets()]
SIZES = [1, 2, 7, 255, 256, 257, 1000, 5000, 40_000]
WAYS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.3},
    {"temperature": 2.0},
    {"temperature": 1e-5},
    {"top_k": 1},
    {"top_k": 50},
    {"top_k": 900},
    {"top_k": 10**6},
    {"top_p": 0.01},
    {"top_p": 0.5},
    {"top_p": 0.95},
    {"top_p": 0.9999},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"top_p": 0.9, "min_p": 0.001},
    {"top_k": 40, "top_p": 0.7, "min_p": 0.05, "temperature": 1.5},
]


def backend_of(name: str) -> Any:
    return reference if name == "torch" else cpu


def rows_of(numbers: np.ndarray[Any, Any], **how: Any) -> list[DrawRow]:
    same = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | how
    return [DrawRow(number, **same) for number in numbers]


def draw(backend: str, logits: torch.Tensor, rows: list[DrawRow], num_threads: int = 1) -> list[int]:
    with using(None if backend == "torch" else backend, num_threads):
        drawn: list[int] = backend_of(backend).draw_tokens(logits.numpy(), rows)
        return drawn


def shares(row: torch.Tensor, **how: Any) -> tuple[list[int], np.ndarray[Any, Any]]:
    """Return the tokens that are left, in the order they are drawn in, and the shares at which each ends."""
    scaled = row.double() / np.float32(how.get("temperature", 1.0)).item()
    probabilities = torch.softmax(scaled, 0).numpy()
    order = np.argsort(-probabilities, kind="stable")
    is_cut = how.get("top_k", 0) or how.get("top_p", 1.0) < 1 or how.get("min_p", 0.0) > 0
    if is_cut:
        order = order[: how.get("top_k") or None]
        mass = probabilities[order].sum() if how.get("top_k") else 1.0
        before = np.cumsum(probabilities[order]) - probabilities[order]
        keep = ((before < how.get("top_p", 1.0) * mass) | (how.get("top_p", 1.0) == 1)) & (
            probabilities[order] >= how.get("min_p", 0.0) * probabilities[order[0]]
        )
        keep[0] = True
        order = order[keep]
    else:
        order = np.arange(len(order))
    ends = np.cumsum(probabilities[order])
    return order.tolist(), ends / ends[-1]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("how", WAYS, ids=str)
def test_a_number_falls_into_its_tokens_share(backend: str, how: dict[str, Any]) -> None:
    random = np.random.default_rng(0)
    for size in SIZES:
        for spread in (0.01, 1.0, 5.0):
            num_rows = 8
            logits = torch.from_numpy(random.normal(0, spread, (num_rows, size)).astype(np.float32))
            numbers = np.concatenate([[0.0, 1 - 2.0**-53], random.random(num_rows - 2)])
            for row, token_id, number in zip(
                logits, draw(backend, logits, rows_of(numbers, **how)), numbers, strict=True
            ):
                tokens, ends = shares(row, **how)
                # Where the cut falls is a matter of rounding, so a share may end a token's worth earlier or later.
                slack = 3e-6 * max(1.0, 1 / how.get("temperature", 1.0)) + (ends[-1] - ends[-2] if len(ends) > 1 else 0)
                assert token_id in tokens, (size, spread)
                place = tokens.index(token_id)
                begin = ends[place - 1] if place else 0.0
                assert begin - slack <= number <= ends[place] + slack, (size, spread)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_likeliest_is_the_first_of_the_likeliest(backend: str) -> None:
    for size in SIZES:
        logits = torch.zeros(3, size)
        logits[1, size // 2 :] = 1.0
        logits[2] = -torch.inf
        logits[2, size - 1] = -7.0
        rows = rows_of(np.full(3, 0.5), temperature=0.0, top_p=0.5, top_k=3)
        assert draw(backend, logits, rows) == [0, size // 2, size - 1]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("how", WAYS, ids=str)
def test_what_cannot_be_is_never_drawn(backend: str, how: dict[str, Any]) -> None:
    logits = torch.full((64, 3000), -torch.inf)
    logits[:, 1234] = 1.0
    logits[:, 2999] = 0.5
    numbers = np.linspace(0, 1 - 2.0**-53, 64)
    assert set(draw(backend, logits, rows_of(numbers, **how))) <= {1234, 2999}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("how", [{"temperature": 0.0}, *WAYS], ids=str)
def test_what_is_no_number_is_no_token(backend: str, how: dict[str, Any]) -> None:
    logits = torch.randn(5, 700, generator=torch.Generator().manual_seed(0))
    logits[1, 3], logits[2, 699], logits[3] = torch.nan, torch.inf, -torch.inf
    assert [token < 0 for token in draw(backend, logits, rows_of(np.full(5, 0.3), **how))] == [
        False,
        *[True] * 3,
        False,
    ]


@pytest.mark.parametrize("isa", instruction_sets())
def test_a_row_depends_on_nothing_but_itself(isa: str) -> None:
    random = np.random.default_rng(1)
    logits = torch.from_numpy(random.normal(0, 2, (32, 9001)).astype(np.float32))
    numbers = random.random(32)
    rows = [row_of for row in range(32) for row_of in rows_of(numbers[row : row + 1], **WAYS[row % len(WAYS)])]
    together = draw(isa, logits, rows, num_threads=3)
    alone = [
        draw(isa, logits[row : row + 1], rows_of(numbers[row : row + 1], **WAYS[row % len(WAYS)]))[0]
        for row in range(32)
    ]
    assert together == alone


@pytest.mark.parametrize("backend", BACKENDS)
def test_top_tokens(backend: str) -> None:
    for size in SIZES:
        logits = torch.randn(4, size, generator=torch.Generator().manual_seed(size)) * 4
        for count in {0, 1, min(20, size), min(700, size)}:
            with using(None if backend == "torch" else backend):
                top = backend_of(backend).top_tokens(logits.numpy(), count)
            expected = logits.topk(count)
            assert top.tokens == expected.indices.tolist()
            assert top.logits == expected.values.tolist()
            assert top.log_totals == pytest.approx(torch.logsumexp(logits.double(), -1).tolist(), abs=2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_tokens_that_cannot_be_are_not_among_the_top(backend: str) -> None:
    logits = torch.full((1, 300), -torch.inf)
    logits[0, 7] = 2.0
    with using(None if backend == "torch" else backend):
        top = backend_of(backend).top_tokens(logits.numpy(), 5)
    assert (top.tokens, top.logits) == ([[7]], [[2.0]])
    assert top.log_totals == pytest.approx([2.0])


@needs_native
def test_as_many_ways_to_draw_as_rows_are_wanted() -> None:
    logits = torch.zeros(2, 300)
    with pytest.raises(KernelUnsupported, match="takes dense float32 logits of 1 rows"):
        cpu.draw_tokens(logits.numpy(), rows_of(np.zeros(1)))
    assert NATIVE is not None
    with pytest.raises(ValueError, match="not as many ways to draw as rows"):
        NATIVE.draw_tokens(logits.data_ptr(), 2, 300, b"")
