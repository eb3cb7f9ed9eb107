"""Checkpoints as arrays: the same tensors, and the same refusals, as torch's way of reading them."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from penstock.errors import ModelUnreadable
from penstock.kernels.native.array import Array, as_torch
from penstock.models.arrays import ArrayWeights
from penstock.models.files import MappedFile
from penstock.models.weights import Weights

Checkpoint = Callable[[str], Path]
DTYPES = ("float32", "bfloat16", "float16")
STORED = (*DTYPES, "float64")


def arrays_of(path: Path) -> ArrayWeights:
    return ArrayWeights(path, {file: MappedFile(file) for file in path.glob("*.safetensors")})


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("wanted", DTYPES)
def test_tensors_are_torch_s(stored: str, wanted: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    numbers = torch.randn(50, 70, generator=torch.Generator().manual_seed(0))
    numbers[0, :4] = torch.tensor([0.0, -0.0, torch.inf, torch.nan])
    numbers[1] = torch.linspace(1, 1.05, 70)  # halfway between neighbours, and beside that
    save_file({"a": numbers.to(getattr(torch, stored)), "b": torch.zeros(3)}, tmp_path / "model.safetensors")
    weights = arrays_of(tmp_path)
    found = weights.take("a", (50, 70), wanted)
    assert isinstance(found, Array)
    with Weights(tmp_path) as others:
        expected = others.take("a", (50, 70), wanted)
    is_number = ~expected.isnan()
    assert torch.equal(as_torch(found)[is_number], expected[is_number])
    assert torch.equal(as_torch(found).isnan(), ~is_number)
    assert list(weights.unused()) == ["b"]


def test_names_and_sizes_are_those_of_the_files(checkpoint: Checkpoint) -> None:
    path = checkpoint("llama")
    with Weights(path) as others:
        assert sorted(arrays_of(path).sizes()) == sorted(others.sizes())
        assert list(arrays_of(path).unused()) == list(others.unused())


@pytest.mark.parametrize(
    ("name", "shape"), [("model.norm.weight", (3,)), ("model.nothing.weight", (3,)), ("model.ids", (4,))]
)
def test_refusals_are_worded_alike(name: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({}))
    tensors = {"model.norm.weight": torch.ones(4), "model.ids": torch.ones(4, dtype=torch.int32)}
    save_file(tensors, tmp_path / "model.safetensors")
    messages = []
    with Weights(tmp_path) as others:
        for weights in (arrays_of(tmp_path), others):
            with pytest.raises(ModelUnreadable) as caught:
                weights.take(name, shape, "float32")
            messages.append(caught.value.message)
    assert messages[0].replace("I32", "torch.int32") == messages[1]


@pytest.mark.parametrize("dtype", STORED)
def test_a_header_that_gives_a_tensor_other_bytes_than_its_own_is_refused(dtype: str, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(8, dtype=getattr(torch, dtype))}, file)
    content = file.read_bytes()
    end = 8 * getattr(torch, dtype).itemsize
    assert content.count(f"[0,{end}]".encode()) == 1
    file.write_bytes(content.replace(f"[0,{end}]".encode(), f"[0,{end - 1}]".encode().ljust(len(f"[0,{end}]"))))
    with pytest.raises(ValueError, match="a is of another size"):
        MappedFile(file)
