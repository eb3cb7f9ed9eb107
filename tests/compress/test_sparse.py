"""Whole tiny models with zeros: saved as floats, the pattern kept, read by Penstock and transformers alike."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from penstock.compress.calibration.texts import CalibrationOptions
from penstock.compress.recipe import parse_recipe
from penstock.compress.run import Compression, CompressOptions, Report
from penstock.models.decoder import load_model
from tests.packing import layout_of
from tests.tiny_models import make_checkpoint, reference_logits

FEW = CalibrationOptions(num_samples=6, length=48, force=True)
IDS = [i * 7 % 320 for i in range(40)]


def _compress(model: Path, out: Path, steps: str) -> Report:
    return Compression(
        CompressOptions(model=model, out=out, recipe=parse_recipe(f"steps: [{steps}]"), calibration=FEW)
    ).run()


@torch.inference_mode()
def _logits(path: Path) -> torch.Tensor:
    model = load_model(path, dtype="float32")
    layout = layout_of([40], [40], [[0, 1, 2]], 16)
    return model.logits(model.forward(torch.tensor(IDS), layout, model.new_cache(3, 16)))


@pytest.mark.parametrize("family", ["llama", "phi3", "qwen3-moe"])
@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_patterns_hold_in_what_is_written_and_transformers_reads_it(
    family: str, method: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    report = _compress(checkpoint(family), tmp_path / "out", f"{{match: decoder, method: {method}, pattern: '2:4'}}")
    assert report.largest_difference < 1e-4
    assert all((unit.error is None) == (method == "magnitude") and unit.bits is None for unit in report.units)
    written = load_file(tmp_path / "out" / "model.safetensors")
    matrices = [
        tensor for name, tensor in written.items() if "proj" in name and name.endswith("weight") and "layers" in name
    ]
    assert matrices
    for matrix in matrices:
        assert ((matrix.view(len(matrix), -1, 4) == 0).sum(-1) == 2).all()
    torch.testing.assert_close(_logits(tmp_path / "out"), reference_logits(tmp_path / "out", IDS), rtol=1e-3, atol=1e-3)


def test_zeros_and_codes_stand_beside_each_other(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    steps = "{match: decoder, method: gptq, group: 32}, {match: mlp, method: sparsegpt, sparsity: 0.5}"
    report = _compress(checkpoint("llama"), tmp_path / "out", steps)
    assert report.largest_difference < 1e-4
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert "model.layers.0.self_attn.q_proj.weight_packed" in written
    assert float((written["model.layers.1.mlp.down_proj.weight"] == 0).float().mean()) == pytest.approx(0.5, abs=0.01)


def test_the_checkpoints_own_dtype_is_kept(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", dtype=torch.bfloat16)
    report = _compress(source, tmp_path / "out", "{match: decoder, method: wanda, sparsity: 0.5}")
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}
    assert report.bytes_after == pytest.approx(report.bytes_before, rel=0.01)
