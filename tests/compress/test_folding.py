"""Scales that move from a unit into what produces its inputs change nothing."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from penstock.compress.calibration.stream import LayerStream
from penstock.compress.checkpoint import Checkpoint
from penstock.compress.folding import fold, producer_of
from penstock.compress.units import units_of
from penstock.kernels import ReferenceOps

FOLDED = {
    "llama": {"qkv", "o", "gate_up", "down"},
    "llama-tied-biases": {"qkv", "o", "gate_up", "down"},
    "qwen2": {"qkv", "o", "gate_up", "down"},
    "phi3": {"qkv", "o", "gate_up", "down"},
    "gemma2": {"qkv", "o", "gate_up", "down"},
    "olmo2": {"o", "down"},  # it has no norms before its blocks
    "mixtral": {"qkv", "o"},
}


@pytest.mark.parametrize("family", FOLDED)
@torch.inference_mode()
def test_a_layer_computes_the_same(family: str, checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    source = Checkpoint(checkpoint(family))
    config = source.config
    sequences = [torch.randint(0, 320, (length,)).tolist() for length in (30, 7)]
    stream = LayerStream(config, source, sequences, ReferenceOps())
    stream.embed(tmp_path / "in")
    stream.run_layer(0, tmp_path / "in", tmp_path / "out")
    random = torch.Generator().manual_seed(0)
    folded = set()
    changed: dict[str, torch.Tensor] = {}
    for unit in units_of(config):
        producer = producer_of(unit, config)
        if unit.layer or producer is None:
            continue
        folded.add(unit.role)
        scales = torch.rand(unit.num_inputs, generator=random) + 0.5
        if producer.shared_by > 1:
            runs = scales.view(-1, producer.shared_by, producer.width)
            scales = runs[:, :1].expand_as(runs).flatten()
        for name in (*producer.tensors, *(f"{module}.weight" for module in unit.modules)):
            if name not in changed:
                changed[name] = source.read(name)
        exact = fold(producer, scales, changed, dtype=torch.float32, norm_offset=config.norms.offset)
        for module in unit.modules:
            changed[f"{module}.weight"] = changed[f"{module}.weight"] * exact
    stream.run_layer(0, tmp_path / "in", tmp_path / "folded", replaced=changed)
    assert folded == FOLDED[family]
    ours, theirs = (torch.from_numpy(stream.read(tmp_path / name).copy()) for name in ("folded", "out"))
    torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=1e-4)


def test_what_a_norm_loses_by_rounding_the_unit_makes_up_for(checkpoint: Callable[[str], Path]) -> None:
    source = Checkpoint(checkpoint("llama"))
    producer = producer_of(units_of(source.config)[0], source.config)
    assert producer is not None
    (name,) = producer.tensors
    tensors = {name: source.read(name)}
    before, scales = tensors[name], torch.rand(64) + 0.5
    exact = fold(producer, scales, tensors, dtype=torch.bfloat16, norm_offset=0.0)
    assert torch.equal(tensors[name], tensors[name].bfloat16().float())
    assert not torch.equal(exact, scales)
    torch.testing.assert_close(tensors[name] * exact, before)
