"""Tokens' vectors: the same bits from a table and from the head that is tied to it."""

import pytest
import torch
from torch import Tensor

from penstock.kernels import QUANTIZATIONS, CPUOps, Quantization, ReferenceOps, WeightCodes
from penstock.kernels.linear.reference import dequantize
from tests.kernels.backends import instruction_sets, needs_native, using

SHAPES = [(1, 1), (33, 31), (70, 64), (1000, 97)]


def some_tokens(vocab_size: int) -> Tensor:
    token_ids = torch.randint(0, vocab_size, (300,))
    token_ids[:2] = torch.tensor([0, vocab_size - 1])
    return token_ids


def no_table() -> Tensor:
    raise AssertionError("the head has its rows")


@pytest.mark.parametrize("isa", instruction_sets())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("vocab_size", "width"), SHAPES)
def test_rows_are_those_of_the_table(isa: str, dtype: torch.dtype, vocab_size: int, width: int) -> None:
    torch.manual_seed(0)
    table = torch.randn(vocab_size, width).to(dtype)
    token_ids = some_tokens(vocab_size)
    expected = ReferenceOps().prepare_embedding(lambda: table, "float32", scale=1.7)(token_ids)
    with using(isa):
        head = CPUOps().prepare_linear(table, None)
        tied = CPUOps().prepare_embedding(no_table, "float32", scale=1.7, tied=head)
        plain = CPUOps().prepare_embedding(lambda: table, "float32", scale=1.7)
    for num_threads in (1, 3):
        with using(isa, num_threads):
            assert torch.equal(plain(token_ids), expected)
            assert torch.equal(tied(token_ids), expected)
    for none in (-1, vocab_size):
        for embedding in (plain, tied):
            with pytest.raises(IndexError, match=f"token {none} is not one of {vocab_size}"):
                embedding(torch.tensor([0, none]))


@pytest.mark.parametrize("isa", instruction_sets())
@pytest.mark.parametrize(("bits", "group"), [(8, 512), (8, 32), (4, 64)])
@pytest.mark.parametrize("has_zeros", [False, True])
@pytest.mark.parametrize(("vocab_size", "width"), SHAPES)
def test_rows_of_codes_are_what_they_stand_for(
    isa: str, bits: int, group: int, has_zeros: bool, vocab_size: int, width: int
) -> None:
    torch.manual_seed(0)
    parts = (vocab_size, -(-width // group))
    codes = WeightCodes(
        Quantization(bits=bits, group=group, int8_activations=True),
        torch.randint(0, 2**bits, (vocab_size, width), dtype=torch.uint8),
        torch.randn(parts),
        torch.randint(0, 2**bits, parts, dtype=torch.uint8) if has_zeros else None,
    )
    token_ids = some_tokens(vocab_size)
    with using(isa):
        head = CPUOps().prepare_linear(codes, None)
        embedding = CPUOps().prepare_embedding(no_table, "float32", scale=1.7, tied=head)
        assert torch.equal(embedding(token_ids), dequantize(codes)[token_ids] * 1.7)


@needs_native
@pytest.mark.parametrize("quantize", QUANTIZATIONS)
def test_a_rounded_head_is_not_read(quantize: str) -> None:
    table, ops = torch.randn(40, 64), CPUOps(QUANTIZATIONS[quantize])
    embedding = ops.prepare_embedding(lambda: table, "float32", tied=ops.prepare_linear(table, None))
    token_ids = torch.tensor([3, 39, 3])
    assert torch.equal(embedding(token_ids), table[token_ids])
