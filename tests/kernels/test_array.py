"""Arrays: what passes see of them is what they would see of torch's tensors, and nothing can be computed by mistake."""

import operator
from collections.abc import Callable

import numpy as np
import pytest
import torch

from penstock.kernels.dtypes import dtype_name, rounded, torch_dtype
from penstock.kernels.native.array import Array, NotNative, as_torch, joined, plus, zeros


def pair(*shape: int) -> tuple[Array, torch.Tensor]:
    """Return an array and a tensor of the same numbers."""
    numbers = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    return Array(numbers), torch.from_numpy(numbers.copy())


@pytest.mark.parametrize(
    "look",
    [
        lambda x: x,
        lambda x: x[1],
        lambda x: x[1:3],
        lambda x: x[:, 2:4],
        lambda x: x[1:, :, 0],
        lambda x: x.view(2, 2, 30),
        lambda x: x.view(-1, 5),
        lambda x: x.flatten(1),
        lambda x: x[2].view(3, 10),
        lambda x: x.unsqueeze(1),
        lambda x: x[:, 1].unsqueeze(0),
        lambda x: x.float(),
    ],
)
def test_a_look_at_one_is_as_torch_s(look: Callable[[object], object]) -> None:
    array, tensor = pair(4, 6, 5)
    seen, expected = look(array), look(tensor)
    assert isinstance(seen, Array)
    assert isinstance(expected, torch.Tensor)
    assert (seen.shape, seen.ndim, len(seen)) == (expected.shape, expected.ndim, len(expected))
    assert (seen.stride(), seen.stride(0)) == (expected.stride(), expected.stride(0))
    assert seen.is_contiguous() == expected.is_contiguous()
    assert (seen.numel(), seen.nbytes, seen.element_size()) == (expected.numel(), expected.nbytes, 4)
    assert seen.data_ptr() - array.data_ptr() == expected.data_ptr() - tensor.data_ptr()
    assert torch.equal(seen.torch(), expected)
    assert seen.torch().data_ptr() == seen.data_ptr() == as_torch(seen.as_tensor()).data_ptr()


@pytest.mark.parametrize(
    "compute",
    [
        lambda x: x + 1,
        lambda x: 2 * x,
        lambda x: x.mul_(2),
        lambda x: x.clone(),
        lambda x: x.double(),
        lambda x: x[[0, 1]],
        lambda x: x[x],
        lambda x: x[torch.tensor([1])],
        lambda x: x[:, :2].view(8),
        lambda x: np.add(x, 1),
        lambda x: torch.softmax(x, 0),
        lambda x: torch.cat([x, x]),
        lambda x: torch.ones(4, 5) @ x,
        lambda x: operator.setitem(x, 0, 1),
        lambda x: zeros(2, dtype="int64").float(),
    ],
)
def test_nothing_computes_with_one(compute: Callable[[Array], object]) -> None:
    array, _ = pair(4, 5)
    with pytest.raises(TypeError):
        compute(array)


def test_python_looks_in_vain_for_what_is_its_own() -> None:
    array, _ = pair(4, 5)
    with pytest.raises(AttributeError):
        array.__index__()
    with pytest.raises(NotNative, match="no compiled kernel does what 'sigmoid' does"):
        array.sigmoid()


def test_halves_of_floats_are_bfloat16() -> None:
    numbers = torch.tensor([0.0, -1.5, 3.140625, torch.inf, -torch.inf, 1e-40, torch.nan]).bfloat16()
    array = Array(numbers.view(torch.int16).numpy().view(np.uint16), "bfloat16")
    assert (array.dtype, array.nbytes) == ("bfloat16", 14)
    assert torch.equal(array.torch()[:-1], numbers[:-1])
    assert torch.equal(array.float().torch()[:-1], numbers.float()[:-1])
    assert array.float().torch()[-1].isnan()
    assert array.view(7, 1)[2:].dtype == "bfloat16"


def test_what_loading_makes_of_them_is_what_it_makes_of_tensors() -> None:
    array, tensor = pair(6)
    half = tensor.bfloat16()
    bits = Array(half.view(torch.int16).numpy().view(np.uint16), "bfloat16")
    assert torch.equal(as_torch(plus(array.as_tensor(), 1.5)), plus(tensor, 1.5))
    together = joined([array.as_tensor(), bits.as_tensor()])
    assert torch.equal(as_torch(together), joined([tensor, half.float()]))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_numbers_are_rounded_as_torch_rounds(dtype: str) -> None:
    generator = np.random.default_rng(0)
    for value in (0.0, 1.0, 1.00390625, 1.01171875, -28.0, 53.6656, *generator.normal(scale=100, size=500)):
        assert rounded(float(value), dtype) == torch.tensor(value, dtype=torch_dtype(dtype)).item()


def test_dtypes_have_the_names_that_configurations_use() -> None:
    for name in ("float32", "bfloat16", "float16", "int8"):
        assert dtype_name(torch_dtype(name)) == dtype_name(name) == name
