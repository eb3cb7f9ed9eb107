"""Whole checkpoints: what is written is whole, others read it, and it is read back."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor
from transformers import CompressedTensorsConfig

from penstock.errors import InvalidSetting
from penstock.models.decoder import load_model
from penstock.models.weights import Weights
from penstock.quant import QuantizedWeight, Scheme, layout_to_write
from penstock.quant.writing import widen, write_checkpoint
from tests.packing import layout_of
from tests.quantized_files import PROJECTIONS, SchemeOf, all_alike, quantize_checkpoint, quantize_weight
from tests.tiny_models import make_checkpoint, reference_logits

W4 = Scheme(bits=4, group=32)
TOKENS = [(11 * i + 5) % 256 for i in range(20)]


def test_all_that_a_model_needs_is_there(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "made", "qwen2", dtype=torch.bfloat16)
    (source / "generation_config.json").write_text('{"temperature": 0.5}')
    (source / "README.md").write_text("Perplexity: that of other weights")
    coded, plain = quantize_checkpoint(source, tmp_path, all_alike(W4))
    for directory in (coded, plain):
        for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
            assert (directory / name).read_bytes() == (source / name).read_bytes()
        assert not (directory / "README.md").exists()
        modes = {(directory / name).stat().st_mode for name in ("config.json", "model.safetensors")}
        assert len(modes) == 1
    ours, theirs = (json.loads((path / "config.json").read_text()) for path in (coded, source))
    assert {key: value for key, value in ours.items() if key != "quantization_config"} == theirs
    widened = json.loads((plain / "config.json").read_text())
    assert "quantization_config" not in widened
    assert widened["dtype"] == "float32"
    # What was not quantized is what it was.
    kept, before = (load_file(path / "model.safetensors") for path in (coded, source))
    for name, tensor in before.items():
        if not name.removesuffix(".weight").endswith(PROJECTIONS):
            torch.testing.assert_close(kept[name], tensor, atol=0, rtol=0)


def test_shards_hold_no_more_than_they_may(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "made", "llama")

    def weights() -> Iterator[tuple[str, QuantizedWeight | Tensor]]:
        with Weights(source) as stored:
            yield from ((name, stored.read(name)) for name in stored)

    write_checkpoint(tmp_path / "split", source, weights(), shard_bytes=100_000)
    files = sorted((tmp_path / "split").glob("*.safetensors"))
    assert len(files) > 3
    assert [file.name for file in files] == [
        f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))
    ]
    for file in files:
        assert sum(tensor.nbytes for tensor in load_file(file).values()) <= 100_000
    torch.testing.assert_close(
        reference_logits(tmp_path / "split", TOKENS), reference_logits(source, TOKENS), atol=0, rtol=0
    )
    with pytest.raises(InvalidSetting, match="is not empty"):
        write_checkpoint(tmp_path / "split", source, weights())
    with pytest.raises(InvalidSetting, match="no layout 'marlin'"):
        write_checkpoint(tmp_path / "other", source, weights(), "marlin")


def some_of_each(module: str) -> Scheme | None:
    if "down_proj" in module:
        return Scheme(bits=8)
    return None if "layers.1.self_attn" in module or module == "lm_head" else Scheme(bits=4, group=32, symmetric=False)


@pytest.mark.parametrize("layout", ["compressed-tensors", "gptq", "gptq_v2"])
def test_what_is_written_is_read_back(layout: str, tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "made", "llama")
    coded, _ = quantize_checkpoint(source, tmp_path, some_of_each, layout)
    with Weights(coded) as stored, Weights(source) as before:
        assert stored.quantized is not None
        assert set(stored.quantized) == {
            name.removesuffix(".weight")
            for name in before
            if name.removesuffix(".weight").endswith(PROJECTIONS) and some_of_each(name.removesuffix(".weight"))
        }
        for module in stored.quantized:
            scheme = some_of_each(module)
            assert scheme is not None
            expected = quantize_weight(before.read(f"{module}.weight"), scheme)
            found = stored.quantized.weight(module)
            assert found.scheme == scheme
            assert torch.equal(found.codes, expected.codes)
            assert torch.equal(found.scales, expected.scales)
        widened = dict(widen(stored, stored.quantized, torch.bfloat16))
        assert set(widened) == set(before)
        assert {tensor.dtype for tensor in widened.values()} == {torch.bfloat16}


@torch.inference_mode()
def _logits(path: Path) -> Tensor:
    model = load_model(path, dtype="float32")
    size = len(TOKENS)
    layout = layout_of([size], [size], [[0, 1]], 16)
    return model.logits(model.forward(torch.tensor(TOKENS), layout, model.new_cache(2, 16)))


def symmetric_of_each(module: str) -> Scheme | None:
    scheme = some_of_each(module)
    return None if scheme is None else replace(scheme, symmetric=True)


BY_TRANSFORMERS: dict[str, SchemeOf] = {
    "4 bits": all_alike(W4),
    "4 bits with zeros": all_alike(replace(W4, symmetric=False)),
    "8 bits by outputs": all_alike(Scheme(bits=8)),
    "3 bits": all_alike(Scheme(bits=3, group=32)),
    "rounded activations": all_alike(Scheme(bits=8, activations="dynamic")),
    "static activations": all_alike(Scheme(bits=8, activations="static")),
    "static activations with zeros": all_alike(Scheme(bits=8, activations="static", activation_zeros=True)),
    "some of each": symmetric_of_each,
}


@pytest.mark.parametrize("case", BY_TRANSFORMERS)
@pytest.mark.filterwarnings("ignore")
def test_transformers_reads_compressed_tensors(case: str, tmp_path: Path) -> None:
    coded, plain = quantize_checkpoint(make_checkpoint(tmp_path / "made", "llama"), tmp_path, BY_TRANSFORMERS[case])
    # Modules that keep codes expect zeros of another shape than the package writes, so there they are widened at once.
    options = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if case == "4 bits with zeros" else {}
    theirs: Any = transformers.AutoModelForCausalLM.from_pretrained(coded, dtype=torch.float32, **options).eval()
    with torch.no_grad():
        found = theirs(torch.tensor([TOKENS])).logits[0]
    exact = reference_logits(plain, TOKENS)
    error = (found - exact).norm() / exact.norm()
    # They round what codes stand for to the scales' float16, and activations where the checkpoint says so.
    if "activations" in case:
        assert error > 2e-3
        # What they compute with activations that are rounded alike is what we do.
        assert "static" not in case or (found - _logits(coded)).norm() < 0.3 * (found - exact).norm()
    else:
        assert error < 2e-3


def test_what_a_layout_has_one_of(tmp_path: Path) -> None:
    with pytest.raises(InvalidSetting, match="one size of groups for all projections, and here are 2"):
        layout_to_write("awq").describe({"a": W4, "b": Scheme(bits=4, group=64)}, [])
