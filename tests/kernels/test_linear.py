"""Every way to multiply by a weight against the reference, with poison around what may be read."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from penstock.errors import KernelUnsupported
from penstock.kernels import QUANTIZATIONS, CPUOps, InputCodes, Quantization, ReferenceOps, WeightCodes
from penstock.kernels.linear.cpu import PackedLinear, form_that_holds
from penstock.kernels.linear.reference import (
    ACTIVATIONS,
    ReferenceGatedLinear,
    ReferenceLinear,
    dequantize,
    round_activations,
)
from penstock.kernels.native import IN_PAIRS
from tests.kernels.backends import instruction_sets, needs_native, using

pytestmark = needs_native

DTYPES = [torch.float32, torch.bfloat16]
SIZES = [(1, 1), (3, 7), (64, 65), (257, 31), (300, 16), (256, 96)]
"""(K, N)"""
NUM_TOKENS = [1, 2, 3, 5, 6, 7, 12, 13, 31, 127, 129, 200]


def between_poison(x: Tensor) -> Tensor:
    """Return a copy of ``x`` with values that are not numbers right before and after it in memory."""
    room = torch.full((x.numel() + 64,), torch.nan)
    inside = room[32:-32].view(x.shape)
    inside.copy_(x)
    return inside


def as_read(x: Tensor, isa: str, weight_dtype: torch.dtype) -> Tensor:
    """Return ``x`` in float64 as a product with a weight of ``weight_dtype`` takes it."""
    in_pairs = isa in IN_PAIRS and weight_dtype is torch.bfloat16
    return x.bfloat16().double() if in_pairs else x.double()


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
                expected = ReferenceLinear(weight.double(), None)(as_read(x, isa, dtype))
                torch.testing.assert_close(plain(x).double(), expected, atol=2e-6, rtol=1e-5)
                with_all = expected + bias.double() + added.double()
                room = between_poison(added)
                assert biased(x, room) is room
                torch.testing.assert_close(room.double(), with_all, atol=4e-6, rtol=1e-5)
                assert room._base is not None
                assert room._base[:32].isnan().all()
                assert room._base[-32:].isnan().all()


@pytest.mark.parametrize("quantize", [None, "int8"])
@pytest.mark.parametrize("isa", instruction_sets())
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_equal_the_reference(isa: str, activation: str, quantize: str | None) -> None:
    torch.manual_seed(0)
    # Products of any size: an activation's tails, where it is almost 0 or x, are among them.
    weight, bias = torch.randn(33, 64) * torch.logspace(-2, 0.7, 33).unsqueeze(1), torch.randn(33)
    with using(isa, 2):
        ops = CPUOps(QUANTIZATIONS[quantize] if quantize else None)
        plain = ops.prepare_linear(weight, bias)
        activated = ops.prepare_linear(weight, bias, activation=activation)
        for num_tokens in (1, 2, 3, 100):
            x, added = between_poison(torch.randn(num_tokens, 64)), torch.randn(num_tokens, 33)
            expected = ACTIVATIONS[activation](plain(x).double()) + added.double()
            torch.testing.assert_close(activated(x, added.clone()).double(), expected, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", instruction_sets())
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize(("num_inputs", "num_outputs"), SIZES)
def test_gated_equals_the_reference(
    isa: str, dtype: torch.dtype, num_inputs: int, num_outputs: int, activation: str
) -> None:
    torch.manual_seed(0)
    gate, up = ((torch.randn(num_outputs, num_inputs) / num_inputs**0.5).to(dtype) for _ in range(2))
    bias = torch.randn(num_outputs)
    with using(isa, 2):
        for gate_bias, up_bias in ((None, None), (bias, None), (None, bias), (bias, -bias)):
            packed = PackedLinear(gate, gate_bias, up, up_bias, activation=activation)
            expected = ReferenceGatedLinear(
                gate.double(),
                up.double(),
                None if gate_bias is None else gate_bias.double(),
                None if up_bias is None else up_bias.double(),
                activation=activation,
            )
            for num_tokens in (1, 2, 7, 40):
                x = torch.randn(num_tokens, num_inputs)
                torch.testing.assert_close(packed(x).double(), expected(as_read(x, isa, dtype)), atol=4e-6, rtol=1e-5)


@pytest.mark.parametrize("isa", instruction_sets())
def test_gelu_of_all_sizes(isa: str) -> None:
    x = torch.cat([torch.linspace(-12, 12, 4001), torch.tensor([0.0, 1e-30, -1e-30, 1e15, -1e15])]).unsqueeze(1)
    with using(isa):
        packed = PackedLinear(torch.ones(1, 1), None, torch.zeros(1, 1), torch.ones(1), activation="gelu_tanh")
        found = packed(x)
    expected = torch.nn.functional.gelu(x.double(), approximate="tanh")
    torch.testing.assert_close(found.double(), expected, atol=2e-6, rtol=2e-6)


FORMS = [
    Quantization(bits=bits, group=group, int8_activations=int8_activations)
    for bits, group in ((8, 512), (8, 32), (4, 32), (4, 64), (4, 96), (4, 128))
    for int8_activations in (False, True)
]


def named(form: Quantization) -> str:
    return f"w{form.bits}a{8 if form.int8_activations else 32}-{form.group}"


def draw_codes(num_outputs: int, num_inputs: int, form: Quantization, *, has_zeros: bool) -> WeightCodes:
    """Return codes of every value there is."""
    shape, num_groups = (num_outputs, num_inputs), -(-num_inputs // form.group)
    return WeightCodes(
        form,
        torch.randint(0, 2**form.bits, shape, dtype=torch.uint8),
        (torch.rand(num_outputs, num_groups) - 0.3) / (2**form.bits * num_inputs**0.5),
        torch.randint(0, 2**form.bits, (num_outputs, num_groups), dtype=torch.uint8) if has_zeros else None,
    )


@pytest.mark.parametrize("has_zeros", [False, True])
@pytest.mark.parametrize("form", FORMS, ids=named)
@pytest.mark.parametrize("isa", instruction_sets())
def test_codes_equal_the_reference(isa: str, form: Quantization, has_zeros: bool) -> None:
    torch.manual_seed(0)
    for num_inputs, num_outputs in [*SIZES, (1100, 40)]:
        gate, up = (draw_codes(num_outputs, num_inputs, form, has_zeros=has_zeros) for _ in range(2))
        exact_gate, exact_up = (dequantize(codes).double() for codes in (gate, up))
        bias = torch.randn(num_outputs)
        with using(isa, 2):
            plain = PackedLinear(gate, bias)
            gated = PackedLinear(gate, bias, up, -bias)
            for num_tokens in NUM_TOKENS:
                x = between_poison(torch.randn(num_tokens, num_inputs))
                seen = round_activations(x) if form.int8_activations else x.double()
                expected = ReferenceLinear(exact_gate, bias.double())(seen)
                torch.testing.assert_close(plain(x).double(), expected, atol=1e-5, rtol=1e-5)
                both = ReferenceGatedLinear(exact_gate, exact_up, bias.double(), -bias.double())(seen)
                torch.testing.assert_close(gated(x).double(), both, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("inputs", [InputCodes(0.021), InputCodes(0.013, 57), InputCodes(0.004, -128)], ids=str)
@pytest.mark.parametrize("form", [form for form in FORMS if form.int8_activations], ids=named)
@pytest.mark.parametrize("isa", instruction_sets())
def test_static_activations_equal_the_reference(isa: str, form: Quantization, inputs: InputCodes) -> None:
    torch.manual_seed(0)
    for num_inputs, num_outputs in [*SIZES, (1100, 40)]:
        gate, up = (replace(draw_codes(num_outputs, num_inputs, form, has_zeros=True), inputs=inputs) for _ in range(2))
        exact_gate, exact_up = (dequantize(codes).double() for codes in (gate, up))
        bias = torch.randn(num_outputs)
        with using(isa, 2):
            plain, biased, gated = PackedLinear(gate, None), PackedLinear(gate, bias), PackedLinear(gate, bias, up)
            for num_tokens in (1, 2, 7, 97):
                x = between_poison(torch.randn(num_tokens, num_inputs))
                seen = round_activations(x, inputs)
                expected = seen @ exact_gate.T
                torch.testing.assert_close(plain(x).double(), expected, atol=2e-5, rtol=1e-5)
                torch.testing.assert_close(biased(x).double(), expected + bias.double(), atol=2e-5, rtol=1e-5)
                both = ReferenceGatedLinear(exact_gate, exact_up, bias.double(), None)(seen)
                torch.testing.assert_close(gated(x).double(), both, atol=2e-5, rtol=1e-5)


def test_a_gate_that_rounds_inputs_otherwise_is_refused() -> None:
    form = Quantization(bits=8, group=512, int8_activations=True)
    gate = draw_codes(8, 64, form, has_zeros=False)
    with pytest.raises(KernelUnsupported, match="round the same inputs"):
        PackedLinear(replace(gate, inputs=InputCodes(0.1)), None, gate)


def kept(weight: Tensor, form: Quantization, up: Tensor | None = None) -> Tensor:
    """Return [N, K], what packing keeps of ``weight``: the product with each input alone."""
    exact = replace(form, int8_activations=False)
    return PackedLinear(weight, None, up, quantization=exact)(torch.eye(weight.shape[1])).T.contiguous()


def in_groups(weight: Tensor, form: Quantization) -> Tensor:
    """Return [N, B, group], padded with zeros."""
    num_outputs, num_inputs = weight.shape
    return F.pad(weight, (0, -num_inputs % form.group)).view(num_outputs, -1, form.group)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", instruction_sets())
@pytest.mark.parametrize(("num_inputs", "num_outputs"), SIZES)
def test_eight_bits_keep_a_127th_of_the_greatest(
    isa: str, dtype: torch.dtype, num_inputs: int, num_outputs: int
) -> None:
    torch.manual_seed(0)
    form = Quantization(bits=8, group=64, int8_activations=True)
    weight = torch.randn(num_outputs, num_inputs).to(dtype)
    groups = in_groups(weight.float(), form)
    scale = groups.abs().amax(-1, keepdim=True) / 127
    with using(isa):
        error = (in_groups(kept(weight, form), form) - groups).abs()
    assert (error <= scale * 0.5001).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", instruction_sets())
@pytest.mark.parametrize(("num_inputs", "num_outputs"), SIZES)
def test_four_bits_keep_more_than_plain_rounding(
    isa: str, dtype: torch.dtype, num_inputs: int, num_outputs: int
) -> None:
    torch.manual_seed(0)
    form = Quantization(bits=4, group=32, int8_activations=True)
    weight = torch.randn(num_outputs, num_inputs).to(dtype)
    groups = in_groups(weight.float(), form)
    # Plain rounding puts the greatest magnitude at the code that is farthest from zero.
    scale = groups.gather(-1, groups.abs().argmax(-1, keepdim=True)) / -8
    plain = (groups / scale).round().nan_to_num().clamp(-8, 7) * scale
    with using(isa):
        found = in_groups(kept(weight, form), form)
        levels = [len(group.unique()) for output in found for group in output]
    error, plain_error = ((x - groups).square().sum(-1) for x in (found, plain))
    # A scale keeps eight bits: what its codes stand for is at most half of 1/128 off.
    assert (error <= plain_error * 1.0001 + groups.square().sum(-1) / 2**16 + 1e-12).all()
    assert max(levels) <= 16
    if num_inputs >= 64:
        assert error.sum() < plain_error.sum() * 0.95


@pytest.mark.parametrize("form", [*QUANTIZATIONS.values()], ids=named)
@pytest.mark.parametrize("isa", instruction_sets())
def test_codes_of_zeros_are_zero(isa: str, form: Quantization) -> None:
    with using(isa):
        product = PackedLinear(torch.zeros(5, 7), None, quantization=form)
        assert torch.equal(product(torch.randn(3, 7)), torch.zeros(3, 5))
        product = PackedLinear(torch.randn(5, 7), None, quantization=form)
        assert torch.equal(product(torch.zeros(3, 7)), torch.zeros(3, 5))


def test_forms_that_no_kernel_has_are_refused() -> None:
    weight = torch.randn(4, 64)
    for bits, group in ((3, 64), (4, 48), (4, 0), (8, 1024)):
        with pytest.raises(KernelUnsupported, match=f"codes of {bits} bits in groups of {group}"):
            PackedLinear(weight, None, quantization=Quantization(bits=bits, group=group, int8_activations=True))
    form = Quantization(bits=4, group=32, int8_activations=True)
    codes = draw_codes(4, 64, form, has_zeros=True)
    with pytest.raises(KernelUnsupported, match=r"\[4, 2\], not a dense"):
        PackedLinear(replace(codes, scales=torch.ones(4, 1)), None)
    with pytest.raises(KernelUnsupported, match="up projection"):
        PackedLinear(weight, None, torch.randn(5, 64))


def test_the_form_that_holds_codes() -> None:
    def held(bits: int, group: int | None) -> tuple[int, int] | None:
        form = form_that_holds(bits, group, int8_activations=False)
        return None if form is None else (form.bits, form.group)

    assert held(2, 32) == held(4, 32) == (4, 32)
    assert held(5, 128) == held(8, 128) == (8, 128)
    assert held(4, None) == (4, 512)
    assert held(4, 1024) == (4, 512)
    assert held(4, 1056) == (4, 352)
    assert held(4, 32 * 17) == (4, 32)
    assert held(4, 16) is None
    assert held(4, 48) is None
    assert held(9, 32) is None


def test_a_setting_goes_for_codes_too() -> None:
    kept = CPUOps().form_of_codes(8, None, int8_activations=True)
    assert kept is not None
    assert kept.int8_activations
    exact = CPUOps(QUANTIZATIONS["w4a16"]).form_of_codes(3, 64, int8_activations=True)
    assert exact == Quantization(bits=4, group=64, int8_activations=False)
    narrow = CPUOps(QUANTIZATIONS["int8"]).form_of_codes(4, 64, int8_activations=False)
    assert narrow == Quantization(bits=4, group=64, int8_activations=True)
    assert CPUOps(QUANTIZATIONS["int4"]).form_of_codes(8, 64, int8_activations=False) is None
    assert ReferenceOps().form_of_codes(4, 64, int8_activations=False) is None


@pytest.mark.parametrize("form", [None, *QUANTIZATIONS.values()], ids=lambda form: named(form) if form else "as it is")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", instruction_sets())
def test_neighbours_change_no_bit(isa: str, dtype: torch.dtype, form: Quantization | None) -> None:
    torch.manual_seed(0)
    x = torch.randn(200, 700)
    with using(isa, 3):
        packed = PackedLinear(torch.randn(100, 700).to(dtype), torch.randn(100), quantization=form)
        alone = torch.cat([packed(row.unsqueeze(0)) for row in x])
        for size in NUM_TOKENS:
            together = torch.cat([packed(part.contiguous()) for part in torch.split(x, size)])
            assert torch.equal(together, alone)


@pytest.mark.parametrize("form", FORMS, ids=named)
@pytest.mark.parametrize("isa", instruction_sets())
def test_neighbours_change_no_bit_beside_zeros(isa: str, form: Quantization) -> None:
    torch.manual_seed(0)
    x = torch.randn(140, 701)
    with using(isa, 3):
        packed = PackedLinear(draw_codes(70, 701, form, has_zeros=True), None)
        alone = torch.cat([packed(row.unsqueeze(0)) for row in x])
        for size in NUM_TOKENS:
            together = torch.cat([packed(part.contiguous()) for part in torch.split(x, size)])
            assert torch.equal(together, alone)


@pytest.mark.parametrize("form", [None, *QUANTIZATIONS.values()], ids=lambda form: named(form) if form else "as it is")
@pytest.mark.parametrize("isa", instruction_sets())
def test_thousands_of_rows_are_each_what_they_are_alone(isa: str, form: Quantization | None) -> None:
    torch.manual_seed(0)
    x = torch.randn(4096, 64)
    with using(isa, 2):
        packed = PackedLinear(torch.randn(33, 64), None, quantization=form)
        together = packed(x)
        for row in (0, 1, 127, 128, 2047, 4095):
            assert torch.equal(together[row : row + 1], packed(x[row : row + 1]))


@pytest.mark.parametrize("form", [None, *QUANTIZATIONS.values()], ids=lambda form: named(form) if form else "as it is")
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("isa", instruction_sets())
def test_what_is_not_a_number_stays_in_its_row(isa: str, value: float, form: Quantization | None) -> None:
    with using(isa):
        packed = PackedLinear(torch.randn(40, 30), None, quantization=form)
        x = torch.randn(9, 30)
        expected = packed(x)
        x[4, 7] = value
        out = packed(x)
    assert not out[4].isfinite().any()
    others = [row for row in range(9) if row != 4]
    assert torch.equal(out[others], expected[others])
