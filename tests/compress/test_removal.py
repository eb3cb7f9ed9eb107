"""Models with layers and channels taken out: smaller in every respect, and the same function as with these zeroed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from penstock.compress import removal, run
from penstock.compress.calibration.texts import CalibrationOptions
from penstock.compress.recipe import parse_recipe
from penstock.compress.removal import layers_to_keep, remove_channels
from penstock.compress.run import Compression, CompressOptions, Report
from penstock.errors import InvalidRecipe
from penstock.models import read_config
from penstock.models.decoder import load_model
from tests.packing import layout_of
from tests.tiny_models import make_checkpoint, reference_logits

FEW = CalibrationOptions(num_samples=6, length=48, force=True)
IDS = [i * 7 % 320 for i in range(40)]


def _compress(model: Path, out: Path, remove: str) -> Report:
    recipe = parse_recipe(f"remove: {{{remove}}}")
    return Compression(CompressOptions(model=model, out=out, recipe=recipe, calibration=FEW)).run()


@torch.inference_mode()
def _logits(path: Path) -> torch.Tensor:
    model = load_model(path, dtype="float32")
    layout = layout_of([40], [40], [[0, 1, 2]], 16)
    return model.logits(model.forward(torch.tensor(IDS), layout, model.new_cache(3, 16)))


def _upstream(path: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@torch.no_grad()
def _silenced(source: Path, out: Path) -> torch.Tensor:
    """Return transformers' logits of ``source`` with the channels that ``out`` lacks zeroed."""
    original, ours = _upstream(source), _upstream(out)
    for layer, smaller in zip(original.model.layers, ours.model.layers, strict=True):
        wide, narrow = layer.mlp.down_proj.weight, smaller.mlp.down_proj.weight
        stays = (wide.T.unsqueeze(1) == narrow.T.unsqueeze(0)).all(-1).any(1)
        assert int(stays.sum()) == narrow.shape[1]
        wide[:, ~stays] = 0
    logits: torch.Tensor = original(torch.tensor([IDS])).logits[0]
    return logits


@pytest.mark.parametrize("family", ["llama-tied-biases", "phi3", "gemma2"])
def test_without_channels_it_is_the_original_with_these_zeroed(
    family: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    source, out = checkpoint(family), tmp_path / "out"
    report = _compress(source, out, "channels: 0.35")
    assert read_config(out).intermediate_size == 64
    assert report.bytes_after < report.bytes_before
    assert report.largest_difference < 1e-4
    assert all(0 < (unit.error or 0) < 1 for unit in report.units)
    torch.testing.assert_close(_logits(out), _silenced(source, out), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(_logits(out), reference_logits(out, IDS), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", ["llama-tied-biases", "phi3-partial", "gemma3", "qwen3-moe"])
def test_without_heads_it_is_the_original_with_these_silent(family: str, tmp_path: Path) -> None:
    # transformers wants the others' width to be a multiple of their heads.
    groups = 3 if "phi3" in family or "qwen" in family else 4
    source, out = tmp_path / "source", tmp_path / "out"
    make_checkpoint(source, family, num_attention_heads=2 * groups, num_key_value_heads=groups)
    report = _compress(source, out, f"heads: {(groups - 2) / groups:.2f}")
    config = read_config(out)
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (4, 2, 16)
    assert report.bytes_after < report.bytes_before
    assert report.largest_difference < 1e-4
    assert all(0 < (unit.error or 0) < 1 for unit in report.units)
    original, ours = _upstream(source), _upstream(out)
    with torch.no_grad():
        for layer, smaller in zip(original.model.layers, ours.model.layers, strict=True):
            wide, narrow = layer.self_attn.o_proj.weight, smaller.self_attn.o_proj.weight
            stays = (wide.T.unsqueeze(1) == narrow.T.unsqueeze(0)).all(-1).any(1)
            # Whole groups of two heads of 16.
            assert sorted(stays.view(groups, 32).float().mean(1).tolist()) == [0] * (groups - 2) + [1, 1]
            wide[:, ~stays] = 0
        expected = original(torch.tensor([IDS])).logits[0]
    torch.testing.assert_close(_logits(out), expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(_logits(out), reference_logits(out, IDS), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", ["llama", "gemma3", "smollm3", "qwen3-moe-sparse"])
def test_without_layers_it_is_the_original_with_these_skipped(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = make_checkpoint(tmp_path / "source", family, num_hidden_layers=4), tmp_path / "out"
    chosen: list[int] = []

    def spy(similarities: list[float], num_layers: int) -> list[int]:
        chosen[:] = layers_to_keep(similarities, num_layers)
        return chosen

    monkeypatch.setattr(run, "layers_to_keep", spy)
    report = _compress(source, out, "layers: 2")
    assert len(chosen) == read_config(out).num_layers == 2
    assert report.bytes_after < report.bytes_before
    original = _upstream(source)
    for index in set(range(4)) - set(chosen):
        original.model.layers[index].forward = lambda hidden_states, *_, **__: hidden_states
    with torch.no_grad():
        expected = original(torch.tensor([IDS])).logits[0]
    torch.testing.assert_close(_logits(out), expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(_logits(out), reference_logits(out, IDS), rtol=1e-3, atol=1e-3)


def test_layers_that_change_least_go() -> None:
    assert layers_to_keep([0.5, 0.99, 0.7, 0.98, 0.97], 3) == [0, 2, 4]


def test_a_layer_that_does_nothing_and_channels_that_say_nothing_go_first(tmp_path: Path) -> None:
    source, out = make_checkpoint(tmp_path / "source", num_hidden_layers=3), tmp_path / "out"
    model = transformers.AutoModelForCausalLM.from_pretrained(source)
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight.zero_()
        model.model.layers[1].mlp.down_proj.weight.zero_()
        for layer in model.model.layers:
            layer.mlp.up_proj.weight[::3] = 0
            layer.self_attn.v_proj.weight[:16] = 0
    model.save_pretrained(source)
    report = _compress(source, out, "layers: 1, channels: 0.333, heads: 0.5")
    assert report.kl == pytest.approx(0, abs=1e-6)
    torch.testing.assert_close(_logits(out), _logits(source), rtol=1e-3, atol=1e-3)


class _Killed(BaseException):
    """Nothing catches it, as nothing catches a kill."""


def test_a_kill_costs_one_layer_and_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_checkpoint(tmp_path / "source", num_hidden_layers=4)
    remove = "layers: 1, channels: 0.35"
    _compress(source, tmp_path / "whole", remove)
    calls = []

    def killed_once(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 2:
            raise _Killed
        return remove_channels(*arguments)

    monkeypatch.setattr(removal, "remove_channels", killed_once)
    with pytest.raises(_Killed):
        _compress(source, tmp_path / "out", remove)
    report = _compress(source, tmp_path / "out", remove)
    assert report.first_layer > 0
    assert len(calls) == 4
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize(
    ("family", "remove", "complaint"),
    [
        ("llama", "layers: 2", "leave at least one"),
        ("llama", "channels: 0.99", "leaves 0 of 96 channels"),
        ("llama", "channels: 0.01", "leaves 96 of 96 channels"),
        ("qwen3-moe", "channels: 0.5", "has experts"),
        ("llama", "heads: 0.1", "leaves 2 of 2 groups of heads"),
        ("olmo2", "heads: 0.5", "normalizes all heads as one row"),
    ],
)
def test_what_a_model_does_not_allow_is_refused_before_any_work(
    family: str, remove: str, complaint: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(InvalidRecipe, match=complaint):
        _compress(checkpoint(family), tmp_path / "out", remove)
    assert list(tmp_path.iterdir()) == []


def test_a_llama_that_others_would_refuse_is_refused(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", num_attention_heads=8, num_key_value_heads=4)
    with pytest.raises(InvalidRecipe, match="leaves 6 heads"):
        _compress(source, tmp_path / "out", "heads: 0.25")


def test_kinds_that_follow_from_positions_are_not_changed_silently(
    checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the first of three layers, the second one, which alone has no experts, would be taken for one with."""
    monkeypatch.setattr(run, "layers_to_keep", lambda *_: [1, 2])
    with pytest.raises(InvalidRecipe, match="of another kind"):
        _compress(checkpoint("qwen3-moe"), tmp_path / "out", "layers: 1")
    assert not (tmp_path / "out").exists()
