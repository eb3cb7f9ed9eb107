"""Every way to multiply by a weight against the reference, with poison around what may be read."""

import pytest
import torch
from torch import Tensor

from penstock.kernels.linear.cpu import PackedLinear
from penstock.kernels.linear.reference import ReferenceGatedLinear, ReferenceLinear
from tests.kernels.backends import instruction_sets, needs_native, using

pytestmark = needs_native

DTYPES = [torch.float32, torch.bfloat16]
SIZES = [(1, 1), (3, 7), (64, 65), (257, 31), (300, 16), (256, 96)]
"""(K, N)"""
NUM_TOKENS = [1, 2, 3, 5, 6, 7, 12, 13, 31, 95, 97, 200]


def between_poison(x: Tensor) -> Tensor:
    """Return a copy of ``x`` with values that are not numbers right before and after it in memory."""
    room = torch.full((x.numel() + 64,), torch.nan)
    inside = room[32:-32].view(x.shape)
    inside.copy_(x)
    return inside


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", instruction_sets())
@pytest.mark.parametrize(("num_inputs", "num_outputs"), SIZES)
def test_packed_equals_the_reference(isa: str, dtype: torch.dtype, num_inputs: int, num_outputs: int) -> None:
    torch.manual_seed(0)
    weight = (torch.randn(num_outputs, num_inputs) / num_inputs**0.5).to(dtype)
    bias = torch.randn(num_outputs).to(dtype)
    for num_threads in (1, 3):
        with using(isa, num_threads):
            plain, biased = PackedLinear(weight, None), PackedLinear(weight, bias)
            for num_tokens in NUM_TOKENS:
                x = between_poison(torch.randn(num_tokens, num_inputs))
                added = torch.randn(num_tokens, num_outputs)
                expected = ReferenceLinear(weight.double(), None)(x.double())
                torch.testing.assert_close(plain(x).double(), expected, atol=2e-6, rtol=1e-5)
                with_all = expected + bias.double() + added.double()
                room = between_poison(added)
                assert biased(x, room) is room
                torch.testing.assert_close(room.double(), with_all, atol=4e-6, rtol=1e-5)
                assert room._base is not None
                assert room._base[:32].isnan().all()
                assert room._base[-32:].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", instruction_sets())
@pytest.mark.parametrize(("num_inputs", "num_outputs"), SIZES)
def test_gated_equals_the_reference(isa: str, dtype: torch.dtype, num_inputs: int, num_outputs: int) -> None:
    torch.manual_seed(0)
    gate, up = ((torch.randn(num_outputs, num_inputs) / num_inputs**0.5).to(dtype) for _ in range(2))
    bias = torch.randn(num_outputs)
    with using(isa, 2):
        for gate_bias, up_bias in ((None, None), (bias, None), (None, bias), (bias, -bias)):
            packed = PackedLinear(gate, gate_bias, up, up_bias)
            expected = ReferenceGatedLinear(
                gate.double(),
                up.double(),
                None if gate_bias is None else gate_bias.double(),
                None if up_bias is None else up_bias.double(),
            )
            for num_tokens in (1, 2, 7, 40):
                x = torch.randn(num_tokens, num_inputs)
                torch.testing.assert_close(packed(x).double(), expected(x.double()), atol=4e-6, rtol=1e-5)


def quantized(weight: Tensor) -> Tensor:
    """Return what 8-bit codes with a scale for each output keep of ``weight``, in float64."""
    scale = weight.float().abs().amax(1, keepdim=True) / 127
    return ((weight.float() / scale).round() * scale).double()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", instruction_sets())
@pytest.mark.parametrize(("num_inputs", "num_outputs"), SIZES)
def test_int8_equals_the_reference_on_quantized_weights(
    isa: str, dtype: torch.dtype, num_inputs: int, num_outputs: int
) -> None:
    torch.manual_seed(0)
    gate, up = ((torch.randn(num_outputs, num_inputs) / num_inputs**0.5).to(dtype) for _ in range(2))
    bias = torch.randn(num_outputs)
    with using(isa, 2):
        plain = PackedLinear(gate, bias, to_int8=True)
        gated = PackedLinear(gate, bias, up, -bias, to_int8=True)
        for num_tokens in NUM_TOKENS:
            x = between_poison(torch.randn(num_tokens, num_inputs))
            expected = ReferenceLinear(quantized(gate), bias.double())(x.double())
            torch.testing.assert_close(plain(x).double(), expected, atol=1e-5, rtol=1e-5)
            both = ReferenceGatedLinear(quantized(gate), quantized(up), bias.double(), -bias.double())(x.double())
            torch.testing.assert_close(gated(x).double(), both, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("isa", instruction_sets())
def test_int8_of_zeros_is_zero(isa: str) -> None:
    with using(isa):
        assert torch.equal(PackedLinear(torch.zeros(5, 7), None, to_int8=True)(torch.randn(3, 7)), torch.zeros(3, 5))


@pytest.mark.parametrize("to_int8", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", instruction_sets())
def test_neighbours_change_no_bit(isa: str, dtype: torch.dtype, to_int8: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(200, 700)
    with using(isa, 3):
        packed = PackedLinear(torch.randn(100, 700).to(dtype), torch.randn(100), to_int8=to_int8)
        alone = torch.cat([packed(row.unsqueeze(0)) for row in x])
        for size in NUM_TOKENS:
            together = torch.cat([packed(part.contiguous()) for part in torch.split(x, size)])
            assert torch.equal(together, alone)


@pytest.mark.parametrize("isa", instruction_sets())
def test_what_is_not_a_number_stays_in_its_row(isa: str) -> None:
    with using(isa):
        packed = PackedLinear(torch.randn(40, 30), None)
        x = torch.randn(9, 30)
        expected = packed(x)
        x[4, 7] = torch.nan
        out = packed(x)
    assert out[4].isnan().all()
    others = [row for row in range(9) if row != 4]
    assert torch.equal(out[others], expected[others])
