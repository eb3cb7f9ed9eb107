"""Whole models with products of low rank: what is written is what was measured, and is served."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from penstock.compress.calibration.texts import CalibrationOptions
from penstock.compress.recipe import parse_recipe
from penstock.compress.run import Compression, CompressOptions, Report
from penstock.errors import ModelUnreadable
from penstock.models.decoder import load_model
from tests.packing import layout_of
from tests.tiny_models import reference_logits

FEW = CalibrationOptions(num_samples=6, length=48, force=True)
IDS = [i * 7 % 320 for i in range(40)]
HALF = "steps: [{match: decoder, method: svd, size: 0.5}]"


def _compress(model: Path, out: Path, recipe: str) -> Report:
    options = CompressOptions(model=model, out=out, recipe=parse_recipe(recipe), calibration=FEW)
    return Compression(options).run()


@torch.inference_mode()
def _logits(path: Path, **options: Any) -> torch.Tensor:
    model = load_model(path, dtype="float32", **options)
    layout = layout_of([40], [40], [[0, 1, 2]], 16)
    return model.logits(model.forward(torch.tensor(IDS), layout, model.new_cache(3, 16)))


def _multiplied(path: Path, out: Path) -> Path:
    """Write the model in ``path`` with each two factors multiplied, as an ordinary checkpoint."""
    out.mkdir()
    for file in path.iterdir():
        if file.suffix == ".json":
            (out / file.name).write_bytes(file.read_bytes())
    config = json.loads((path / "config.json").read_text())
    ranks = config.pop("low_rank")
    (out / "config.json").write_text(json.dumps(config))
    tensors = load_file(path / "model.safetensors")
    for name in ranks:
        first = tensors.pop(f"{name}.low_rank.weight")
        block, _, part = name.rpartition(".")
        beside = {"q_proj": ["k_proj", "v_proj"], "gate_proj": ["up_proj"]}.get(part, [])
        for module in [part, *beside]:
            tensors[f"{block}.{module}.weight"] = tensors[f"{block}.{module}.weight"] @ first
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return out


@pytest.mark.parametrize("family", ["llama-tied-biases", "phi3-partial", "gemma2", "qwen3-moe"])
def test_two_factors_are_their_product(family: str, checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = _compress(checkpoint(family), out, HALF)
    assert report.bytes_after < report.bytes_before * (0.9 if "phi3" in family else 0.8)
    assert report.largest_difference < 1e-4
    assert all(0 < (unit.error or 0) < 1 for unit in report.units)
    found = _logits(out)
    if family != "qwen3-moe":  # whose experts transformers keeps under other names
        expected = reference_logits(_multiplied(out, tmp_path / "plain"), IDS)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(_logits(out, adaptable=True), found, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_what_does_not_know_of_it_refuses_it(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    _compress(checkpoint("llama"), out, "steps: [{match: mlp, layers: 0, method: svd, size: 0.6}]")
    with pytest.raises(RuntimeError, match="mismatch"):
        transformers.AutoModelForCausalLM.from_pretrained(out)
    with pytest.raises(ModelUnreadable, match="low rank already"):
        _compress(out, tmp_path / "again", HALF)
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"low_rank": {"model.layers.0.mlp.down_proj": 0}}))
    with pytest.raises(ModelUnreadable, match="low_rank is"):
        load_model(out)


def test_beside_codes(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """AWQ's scales go into values that are of low rank afterwards."""
    steps = """
    steps:
      - {match: decoder, method: awq, group: 32}
      - {match: "*.self_attn.[qkv]_proj", method: svd, size: 0.7}
    """
    report = _compress(checkpoint("llama"), tmp_path / "out", steps)
    assert {unit.method for unit in report.units} == {"awq", "svd"}
    assert _logits(tmp_path / "out").isfinite().all()
