"""Norm and rotation against their formulas in float64."""

import pytest
import torch

from penstock.kernels import CPUOps
from penstock.kernels.layer_norm.reference import layer_norm
from penstock.kernels.reference import ReferenceOps
from penstock.kernels.rms_norm.reference import rms_norm
from penstock.kernels.rope_write_kv.reference import apply_rope
from tests.kernels.backends import instruction_sets, needs_native, using

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 17), (2, 5, 64), (7, 256)])
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(shape).to(dtype), torch.randn(shape[-1]).to(dtype)
    wide = x.double()
    expected = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    out = rms_norm(x, weight, 1e-5)
    assert out.dtype is dtype
    torch.testing.assert_close(out.double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("isa", instruction_sets())
@pytest.mark.parametrize(("num_tokens", "width"), [(1, 1), (2, 3), (7, 31), (5, 64), (3, 97), (400, 256)])
def test_native_rms_norm(isa: str, num_tokens: int, width: int) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(num_tokens, width) * 3, torch.randn(width)
    wide = x.double()
    expected = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()
    for num_threads in (1, 3):
        with using(isa, num_threads):
            torch.testing.assert_close(CPUOps().rms_norm(x, weight, 1e-6).double(), expected, atol=1e-6, rtol=2e-6)


@pytest.mark.parametrize("isa", instruction_sets())
@pytest.mark.parametrize(("num_tokens", "width"), [(1, 1), (2, 3), (7, 31), (5, 64), (3, 97), (400, 256)])
def test_native_layer_norm(isa: str, num_tokens: int, width: int) -> None:
    torch.manual_seed(0)
    # A mean far from zero, whose square would drown the variance.
    x, weight, bias = torch.randn(num_tokens, width) * 3 + 100, torch.randn(width), torch.randn(width)
    expected = layer_norm(x.double(), weight.double(), bias.double(), 1e-6)
    for num_threads in (1, 3):
        with using(isa, num_threads):
            found = CPUOps().layer_norm(x, weight, bias, 1e-6)
            # A mean of a hundred, rounded to float32, is 4e-6 off.
            torch.testing.assert_close(found.double(), expected, atol=2e-5, rtol=2e-5)
            assert torch.equal(CPUOps().layer_norm(x[-1:], weight, bias, 1e-6), found[-1:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rms_norm_squares_in_float32(dtype: torch.dtype) -> None:
    x = torch.full((1, 64), 1000.0, dtype=dtype)  # its square is beyond float16
    torch.testing.assert_close(rms_norm(x, torch.ones(64, dtype=dtype), 1e-5), torch.ones_like(x), atol=1e-2, rtol=0)


def test_rms_norm_takes_heads_that_lie_inside_a_wider_row() -> None:
    heads = torch.randn(5, 6, 16)
    torch.testing.assert_close(
        rms_norm(heads[:, 2:4], torch.ones(16), 1e-6), rms_norm(heads[:, 2:4].contiguous(), torch.ones(16), 1e-6)
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [2, 6, 64])
def test_rope_turns_pairs_by_their_angles(head_dim: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    half = head_dim // 2
    # Heads as the model hands them over: a slice of the projection of queries, keys and values.
    x = torch.randn(5, 7, head_dim).to(dtype)[:, 1:4]
    angles = torch.rand(5, 1, half) * 6
    cos, sin = angles.cos(), angles.sin()
    pairs = torch.complex(x[..., :half].double(), x[..., half:].double())
    turned = pairs * torch.polar(torch.ones(5, 1, half, dtype=torch.float64), angles.double())
    expected = torch.cat((turned.real, turned.imag), -1)
    out = apply_rope(x, torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1))
    assert out.dtype is dtype
    torch.testing.assert_close(out.double(), expected, atol=TOLERANCE[dtype], rtol=0)


@needs_native
@pytest.mark.parametrize("num_tokens", [1, 700])
def test_native_angles_on_three_axes(num_tokens: int) -> None:
    torch.manual_seed(0)
    sections, head_dim = torch.tensor([2, 0, 5]), 16
    axes, inverse = torch.arange(3).repeat_interleave(sections), 1 / 10 ** torch.rand(7)
    positions = torch.randint(0, 2000, (3, num_tokens))
    expected = ReferenceOps().rope_angles(positions, inverse, head_dim, factor=0.5, axes=axes)
    for i, axis in enumerate(axes):
        torch.testing.assert_close(expected[0][:, 0, i], (positions[axis].float() * inverse[i]).cos() * 0.5)
    ops = CPUOps()
    for num_threads in (1, 3):
        with using(None, num_threads):
            angles = ops.rope_angles(positions, inverse, head_dim, factor=0.5, axes=axes)
            torch.testing.assert_close(angles, expected, atol=1e-6, rtol=0)
    # Text has one position on all axes, and the same bits as in a pass that has no pictures.
    text = positions[:1].expand(3, -1).contiguous()
    alone = ops.rope_angles(positions[0], inverse, head_dim, factor=0.5)
    for with_axes, without in zip(ops.rope_angles(text, inverse, head_dim, factor=0.5, axes=axes), alone, strict=True):
        assert torch.equal(with_axes, without)
