"""Weights kept in 8 bits: the model is the one whose weights were rounded, computed as exactly as any other."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from penstock.errors import InvalidSetting, KernelUnsupported
from penstock.kernels import CPUOps, ReferenceOps, ops_for
from penstock.kernels.native import NATIVE
from penstock.models.decoder import DecoderModel, load_model
from tests.packing import layout_of

needs_native = pytest.mark.skipif(NATIVE is None, reason="the native kernels were not built")


def rounded(weight: torch.Tensor) -> torch.Tensor:
    """Return ``weight`` as codes of 8 bits with a scale for each output have it."""
    scale = weight.abs().amax(1, keepdim=True) / 127
    return (weight / scale).round() * scale


@torch.inference_mode()
def logits(model: DecoderModel, token_ids: list[int]) -> torch.Tensor:
    """Return [T, V] of one sequence."""
    num_blocks = -(-len(token_ids) // 16)
    layout = layout_of([len(token_ids)], [len(token_ids)], [list(range(num_blocks))], 16)
    hidden = model.forward(torch.tensor(token_ids), layout, model.new_cache(num_blocks, 16))
    return model.logits(hidden)


@needs_native
@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral-full"])
def test_int8_is_the_model_of_rounded_weights(family: str, checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    path = checkpoint(family)
    copy = Path(shutil.copytree(path, tmp_path / "rounded"))
    tensors = load_file(path / "model.safetensors")
    save_file(
        {
            name: rounded(tensor) if tensor.ndim == 2 and "embed" not in name else tensor
            for name, tensor in tensors.items()
        },
        copy / "model.safetensors",
    )
    token_ids = [(7 * i) % 250 for i in range(50)]
    found = logits(load_model(path, ops=CPUOps("int8")), token_ids)
    expected = logits(load_model(copy, ops=ReferenceOps()), token_ids)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(found.argmax(-1), expected.argmax(-1))
    # And it is not the model as it was: a setting that did nothing would pass the above on coarse weights.
    exact = logits(load_model(path, ops=ReferenceOps()), token_ids)
    assert (found - exact).abs().max() > 1e-3


def test_an_unknown_precision_is_named() -> None:
    with pytest.raises(InvalidSetting, match="quantize is 'int3'; it can be int8"):
        ops_for(torch.float32, "int3")


def test_what_native_kernels_do_not_read_cannot_be_quantized() -> None:
    with pytest.raises(KernelUnsupported, match="--dtype bfloat16"):
        ops_for(torch.float16, "int8")
