"""A student that learns from a teacher, on tiny models: it comes nearer, and a kill changes nothing."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from penstock.compress import distillation
from penstock.compress.calibration.texts import CalibrationOptions
from penstock.compress.distillation import Distillation, DistillOptions
from penstock.compress.recipe import parse_recipe
from penstock.compress.run import Compression, CompressOptions
from penstock.errors import CalibrationUnfit, InvalidSetting
from tests.tiny_models import make_checkpoint

TEXTS = CalibrationOptions(num_samples=64, length=32)


def _options(student: Path, teacher: Path, out: Path, **others: Any) -> DistillOptions:
    chosen: dict[str, Any] = {"texts": TEXTS, "steps": 12, "batch": 4, "rate": 5e-3, **others}
    return DistillOptions(student=student, teacher=teacher, out=out, **chosen)


@pytest.fixture(scope="module")
def shorter(checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Llama without one of its two layers."""
    out = tmp_path_factory.mktemp("shorter") / "student"
    recipe, texts = parse_recipe("remove: {layers: 1}"), replace(TEXTS, num_samples=6, force=True)
    Compression(CompressOptions(model=checkpoint("llama"), out=out, recipe=recipe, calibration=texts)).run()
    return out


def test_a_student_with_a_layer_less_comes_nearer_to_its_teacher(
    shorter: Path, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    result = Distillation(_options(shorter, checkpoint("llama"), out, steps=40)).run()
    assert result.kl_after.high is not None
    assert result.kl_before.low is not None
    assert result.kl_after.high < result.kl_before.low
    assert result.largest_difference < 1e-4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    assert (out / "tokenizer.json").is_file()
    assert json.loads((out / "config.json").read_text())["num_hidden_layers"] == 1
    assert json.loads((out / "compression.json").read_text())["recipe"]["distill"]["steps"] == 40
    before, after = (load_file(path / "model.safetensors") for path in (shorter, out))
    assert {name: tensor.shape for name, tensor in after.items()} == {n: t.shape for n, t in before.items()}


def test_widths_may_differ(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    narrow = make_checkpoint(tmp_path / "narrow", "llama", hidden_size=32, num_hidden_layers=1)
    result = Distillation(_options(narrow, checkpoint("llama"), tmp_path / "out", steps=40)).run()
    assert result.kl_after.value < result.kl_before.value


def test_a_model_that_sees_learns_what_is_said(seeing_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    teacher, student = seeing_checkpoint("llava"), tmp_path / "student"
    shutil.copytree(teacher, student)
    weights = load_file(student / "model.safetensors")
    noisy = {name: tensor * 0 if name.endswith("down_proj.weight") else tensor for name, tensor in weights.items()}
    save_file(noisy, student / "model.safetensors", metadata={"format": "pt"})
    result = Distillation(_options(student, teacher, tmp_path / "out", steps=30, rate=2e-3)).run()
    assert result.kl_after.value < result.kl_before.value
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert {name: tensor.shape for name, tensor in after.items()} == {n: t.shape for n, t in noisy.items()}
    seeing = [name for name in after if "vision" in name]
    assert seeing
    assert all(torch.equal(after[name], weights[name]) for name in seeing)


class _Killed(BaseException):
    """Nothing catches it, as nothing catches a kill."""


def test_a_kill_costs_only_what_was_not_saved_and_changes_nothing(
    shorter: Path, checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distillation, "SAVE_EVERY_S", 0.0)
    whole, out = tmp_path / "whole", tmp_path / "out"
    Distillation(_options(shorter, checkpoint("llama"), whole)).run()

    def kill(what: str, done: int, total: int) -> None:
        if done == 8 and what.startswith("learning"):
            raise _Killed

    with pytest.raises(_Killed):
        Distillation(_options(shorter, checkpoint("llama"), out)).run(kill)
    assert not out.exists()
    with pytest.raises(InvalidSetting, match="--restart"):
        Distillation(_options(shorter, checkpoint("llama"), out, rate=1e-3)).run()
    result = Distillation(_options(shorter, checkpoint("llama"), out)).run()
    assert result.first_step == 7
    first, second = (load_file(path / "model.safetensors") for path in (whole, out))
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor)


def test_what_cannot_be_learned_is_refused(shorter: Path, checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    other = make_checkpoint(tmp_path / "other", "llama", vocab_size=400)
    with pytest.raises(InvalidSetting, match="another vocabulary"):
        Distillation(_options(other, checkpoint("llama"), tmp_path / "out"))
    few = replace(TEXTS, num_samples=8)
    with pytest.raises(CalibrationUnfit, match="set apart"):
        Distillation(_options(shorter, checkpoint("llama"), tmp_path / "out", texts=few))
