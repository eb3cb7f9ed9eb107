"""A model run one layer at a time, and what is seen of its inputs."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from penstock.compress.calibration.statistics import InputStatistics
from penstock.compress.calibration.stream import LayerStream
from penstock.compress.checkpoint import Checkpoint
from penstock.compress.units import units_of
from penstock.kernels import ReferenceOps
from tests.tiny_models import reference_logits


@pytest.mark.parametrize("family", ["llama", "gemma3", "phi3-partial", "qwen3-moe", "granite"])
@torch.inference_mode()
def test_logits_are_those_of_the_whole_model(
    family: str, checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("penstock.compress.calibration.stream.BATCH_TOKENS", 50)
    path = checkpoint(family)
    source = Checkpoint(path)
    random = torch.Generator().manual_seed(0)
    sequences = [torch.randint(0, 320, (length,), generator=random).tolist() for length in (30, 60, 7, 20)]
    stream = LayerStream(source.config, source, sequences, ReferenceOps())
    here, there = tmp_path / "a", tmp_path / "b"
    stream.embed(here)
    for index in range(source.config.num_layers):
        stream.run_layer(index, here, there)
        here, there = there, here
    for (ids, logits), sequence in zip(stream.finished(here), sequences, strict=True):
        assert ids.tolist() == sequence
        torch.testing.assert_close(logits, reference_logits(path, sequence), atol=1e-4, rtol=0)


@torch.inference_mode()
def test_every_unit_is_watched(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    source = Checkpoint(checkpoint("mixtral"))
    units = [unit for unit in units_of(source.config) if unit.layer == 1]
    stream = LayerStream(source.config, source, [[1, 2, 3], [4, 5]], ReferenceOps())
    seen = {unit.modules: InputStatistics(unit.num_inputs) for unit in units}
    stream.embed(tmp_path / "in")
    stream.run_layer(1, tmp_path / "in", None, observe=lambda modules, x: seen[modules].add(x))
    for unit in units:
        assert seen[unit.modules].num_tokens == 5 or "experts" in unit.label
    # Each token uses two experts.
    assert sum(seen[unit.modules].num_tokens for unit in units if unit.role == "gate_up") == 10


def test_statistics_are_those_of_all_inputs_together() -> None:
    x = torch.randn(20, 6)
    seen = InputStatistics(6)
    for part in (x[:7], x[7:7], x[7:]):
        seen.add(part)
    torch.testing.assert_close(seen.hessian, x.T @ x / 20)
    torch.testing.assert_close(seen.magnitudes, x.abs().mean(0))
    assert torch.equal(seen.greatest, x.abs().amax(0))
