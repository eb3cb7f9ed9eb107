"""Compressing whole tiny models: what comes out runs, and interruptions leave nothing half-written."""

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import structlog
import torch
import transformers
from compressed_tensors.quantization import QuantizationArgs
from safetensors.torch import load_file

from penstock.compress import changes, run, work
from penstock.compress.calibration.texts import CalibrationOptions
from penstock.compress.layer import compress_layer
from penstock.compress.output import tensors_of
from penstock.compress.recipe import NAMED, Recipe, parse_recipe
from penstock.compress.run import Compression, CompressOptions, Report
from penstock.errors import CalibrationUnfit, InternalError, InvalidSetting, ModelUnreadable, NotEnoughDisk
from penstock.kernels import Ops, ReferenceOps
from penstock.models import read_config, resolve_model
from penstock.models.decoder import load_model
from penstock.models.weights import Weights
from tests.packing import layout_of

FEW = CalibrationOptions(num_samples=6, length=48, force=True)
MIXED = """
steps:
  - {match: decoder, method: gptq, group: 32}
  - {match: mlp, layers: 1, method: awq, bits: 3, group: 32, symmetric: false}
  - {match: "*.self_attn.o_proj", layers: 1, method: keep}
"""


def _compress(model: Path, out: Path, recipe: Recipe, **options: Any) -> Report:
    calibration = options.pop("calibration", FEW)
    return Compression(CompressOptions(model=model, out=out, recipe=recipe, calibration=calibration, **options)).run()


@torch.inference_mode()
def _logits(path: Path, ops: Ops | None = None) -> torch.Tensor:
    model = load_model(path, dtype="float32", ops=ops)
    ids = torch.arange(40) * 7 % 320
    return model.logits(model.forward(ids, layout_of([40], [40], [[0, 1, 2]], 16), model.new_cache(3, 16)))


@pytest.mark.parametrize("family", ["llama", "phi3", "gemma2", "qwen3-moe", "olmo2"])
@pytest.mark.parametrize("recipe", ["int8", "w8a8-smooth", "w4a16-gptq", "w4a16-awq"])
def test_what_is_written_is_near_the_original_and_smaller(
    family: str, recipe: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    source, out = checkpoint(family), tmp_path / "out"
    report = _compress(source, out, NAMED[recipe])
    assert report.bytes_after < report.bytes_before
    assert report.largest_difference < 1e-4
    original, ours = _logits(source), _logits(out)
    error = (ours - original).norm() / original.norm()
    # A gate that errs a little chooses other experts.
    assert error < (0.1 if "8" in recipe.partition("-")[0] else 0.6)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    assert (out / "tokenizer.json").is_file()


@pytest.mark.parametrize(
    ("layout", "recipe"),
    [("gptq", "w4a16-gptq"), ("gptq_v2", MIXED), ("awq", "steps: [{match: decoder, method: awq, group: 32}]")],
)
def test_layouts_hold_the_same_model(
    layout: str, recipe: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    for name in ("compressed-tensors", layout):
        steps = NAMED.get(recipe) or parse_recipe(recipe)
        _compress(checkpoint("llama"), tmp_path / name, steps, layout=name)
        config = json.loads((tmp_path / name / "config.json").read_text())["quantization_config"]
        assert config["quant_method"] == name.removesuffix("_v2")
    torch.testing.assert_close(_logits(tmp_path / layout), _logits(tmp_path / "compressed-tensors"))


STATIC = "steps: [{match: decoder, method: rtn, bits: 8, group: null, activations: static, smooth: 0.5, %s}]"


@pytest.mark.parametrize("family", ["llama-tied-biases", "phi3", "gemma3", "qwen3-moe"])
@pytest.mark.parametrize(
    "observer", ["observer: min-max", "observer: percentile, percentile: 99.9", "observer: mse, activation_zeros: true"]
)
def test_static_activations_are_measured_written_and_served(
    observer: str, family: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    source, out = checkpoint(family), tmp_path / "out"
    report = _compress(source, out, parse_recipe(STATIC % observer))
    (group,) = json.loads((out / "config.json").read_text())["quantization_config"]["config_groups"].values()
    has_zeros = "zeros" in observer
    assert group["input_activations"] == {
        "num_bits": 8,
        "type": "int",
        "symmetric": not has_zeros,
        "strategy": "tensor",
        "dynamic": False,
    }
    tensors = load_file(out / "model.safetensors")
    scales = [name.removesuffix(".input_scale") for name in tensors if name.endswith(".input_scale")]
    assert set(scales) == {name.removesuffix(".weight_scale") for name in tensors if name.endswith(".weight_scale")}
    assert any(f"{name}.input_zero_point" in tensors for name in scales) is has_zeros
    original, ours = _logits(source), _logits(out)
    assert (ours - original).norm() < (0.4 if family == "qwen3-moe" else 0.2) * original.norm()
    # What was measured is what is served, rounded activations included.
    assert report.kl > 0


ENDS = """
steps:
  - {match: decoder, method: rtn, group: 32}
  - {match: [embeddings, lm_head], method: rtn, %s}
"""


@pytest.mark.parametrize("family", ["llama", "llama-tied-biases", "gemma2", "gemma3"])
@pytest.mark.parametrize("codes", ["bits: 8, group: null", "bits: 4, group: 32, symmetric: false"])
def test_embeddings_and_head_are_codes_that_are_served(
    family: str, codes: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    source, out = checkpoint(family), tmp_path / "out"
    compression = Compression(
        CompressOptions(model=source, out=out, recipe=parse_recipe(ENDS % codes), calibration=FEW)
    )
    is_tied = read_config(source).tie_word_embeddings
    rows = {row.component: row for row in compression.coverage}
    ends = ["embeddings and head"] if is_tied else ["embeddings", "lm_head"]
    assert list(rows) == ["attention", "mlp", *ends, "norms and biases"]
    assert all("rtn" in rows[name].treatment and rows[name].bytes_after < rows[name].bytes_before / 2 for name in ends)
    report = compression.run()
    assert report.bytes_after < report.bytes_before * 0.6
    with Weights(out) as stored:
        assert stored.quantized is not None
        coded = {"model.embed_tokens", "lm_head"} - ({"lm_head"} if is_tied else set())
        assert coded < set(stored.quantized)
        assert ("lm_head.weight" in stored) is False
    # The reference computes with floats, and the native kernels with the head's codes.
    torch.testing.assert_close(_logits(out), _logits(out, ReferenceOps()), atol=5e-4, rtol=1e-3)
    original, ours = _logits(source), _logits(out)
    assert 1e-4 < (ours - original).norm() / original.norm() < 0.9


@pytest.mark.parametrize("family", ["llama", "llama-tied-biases"])
@pytest.mark.filterwarnings("ignore")
def test_transformers_reads_embeddings_in_codes(family: str, checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    _compress(checkpoint(family), out, parse_recipe(ENDS % "bits: 4, group: 32"))
    # Only where it widens codes at once: its tables of embeddings have no other form.
    theirs: Any = transformers.AutoModelForCausalLM.from_pretrained(
        out, dtype=torch.float32, quantization_config=transformers.CompressedTensorsConfig(dequantize=True)
    ).eval()
    with torch.no_grad():
        found = theirs((torch.arange(40) * 7 % 320)[None]).logits[0]
    ours = _logits(out)
    assert (found - ours).norm() < 0.02 * ours.norm()


def test_a_head_alone_may_be_compressed(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    recipe = "steps: [{match: lm_head, method: rtn, bits: 8, group: null}]"
    report = _compress(checkpoint("llama"), tmp_path / "out", parse_recipe(recipe))
    assert [unit.unit for unit in report.units] == ["lm_head"]
    _compress(checkpoint("llama-tied-biases"), tmp_path / "tied", parse_recipe(recipe))
    for layout in ("gptq", "awq"):
        with pytest.raises(InvalidSetting, match=r"in codes|AWQ"):
            _compress(checkpoint("llama"), tmp_path / "other", parse_recipe(recipe), layout=layout)


@pytest.mark.parametrize("steps", ["", "steps: [{match: decoder, method: rtn, group: 32}]"])
@pytest.mark.filterwarnings("ignore")
def test_scales_of_keys_and_values_cover_what_calibration_saw(
    steps: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    source, out = checkpoint("llama"), tmp_path / "out"
    recipe = parse_recipe(f"{steps}\nkv_cache: fp8")
    compression = Compression(CompressOptions(model=source, out=out, recipe=recipe, calibration=FEW))
    compression.run()
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert QuantizationArgs(**config["kv_cache_scheme"]) == QuantizationArgs(num_bits=8, type="float")
    tensors = load_file(out / "model.safetensors")
    theirs: Any = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    greatest = torch.zeros(2, 2)
    for sequence in compression.calibration.sequences:
        with torch.no_grad():
            cache = theirs(torch.tensor([sequence]), use_cache=True).past_key_values
        seen = [[layer.keys.abs().max(), layer.values.abs().max()] for layer in cache.layers]
        greatest = torch.maximum(greatest, torch.tensor(seen))
    for layer in range(2):
        for i, name in enumerate("kv"):
            scale = tensors[f"model.layers.{layer}.self_attn.{name}_scale"]
            assert scale.shape == (1,)
            assert scale.item() * 448 == pytest.approx(greatest[layer, i].item(), rel=2e-2)


def test_scales_of_keys_and_values_are_not_used_and_the_log_says_so(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    source, out = checkpoint("llama"), tmp_path / "out"
    _compress(source, out, parse_recipe("kv_cache: fp8"))
    with structlog.testing.capture_logs() as logs:
        ours = _logits(out)
    assert [one["num_tensors"] for one in logs if one["event"] == "cache_scales_ignored"] == [4]
    torch.testing.assert_close(ours, _logits(source), atol=0, rtol=0)
    with pytest.raises(InvalidSetting, match="scales of keys"):
        _compress(source, tmp_path / "gptq", parse_recipe("kv_cache: fp8"), layout="gptq")


def test_a_layout_that_cannot_say_it_is_refused_before_any_work(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(InvalidSetting, match="AWQ"):
        _compress(checkpoint("llama"), tmp_path / "out", parse_recipe(MIXED), layout="awq")
    assert list(tmp_path.iterdir()) == []


def test_upstream_layers_are_compressed_when_a_layer_is_watched(
    checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second layer's statistics differ from those in the original model, where the first one's codes are coarse."""
    seen = []
    original = compress_layer

    def spy(checkpoint: Any, treatments: Any, statistics: Any) -> Any:
        seen.append([one.hessian.clone() for one in statistics.values()])
        return original(checkpoint, treatments, statistics)

    monkeypatch.setattr(changes, "compress_layer", spy)
    for first in ("gptq", "keep"):
        text = f"steps: [{{match: decoder, method: gptq, bits: 2}}, {{match: decoder, layers: 0, method: {first}}}]"
        _compress(checkpoint("llama"), tmp_path / first, parse_recipe(text))
    coarse, exact = seen[1][0], seen[3][0]
    assert (coarse - exact).norm() > 0.01 * exact.norm()


class _Killed(BaseException):
    """Nothing catches it, as nothing catches a kill."""


def test_a_kill_costs_one_layer_and_changes_nothing(
    checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, recipe = checkpoint("gemma3"), NAMED["w4a16-gptq"]
    _compress(source, tmp_path / "whole", recipe)
    original, done = compress_layer, []

    def killed_once(checkpoint: Any, treatments: Any, statistics: Any) -> Any:
        index = next(iter(treatments)).layer
        if index == 2 and 2 not in done:
            done.append(index)
            raise _Killed
        done.append(index)
        return original(checkpoint, treatments, statistics)

    monkeypatch.setattr(changes, "compress_layer", killed_once)
    with pytest.raises(_Killed):
        _compress(source, tmp_path / "out", recipe)
    assert not (tmp_path / "out").exists()
    report = _compress(source, tmp_path / "out", recipe)
    assert (report.first_layer, done) == (2, [0, 1, 2, 2, 3])
    assert len(report.units) == 16
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "out"))
    assert first == second


def test_unfinished_work_of_another_recipe_is_not_gone_on_with(
    checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "write_model", _raise(_Killed()))
    with pytest.raises(_Killed):
        _compress(checkpoint("llama"), tmp_path / "out", NAMED["int8"])
    monkeypatch.undo()
    with pytest.raises(InvalidSetting, match="--restart"):
        _compress(checkpoint("llama"), tmp_path / "out", NAMED["w4a16-awq"])
    report = _compress(checkpoint("llama"), tmp_path / "out", NAMED["w4a16-awq"], restart=True)
    assert report.first_layer == 0


def _raise(error: BaseException) -> Callable[..., None]:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    return fail


def test_a_disk_that_fills_up_is_explained_and_gone_on_from(
    checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(work, "save_file", _raise(OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(NotEnoughDisk, match="disk is full"):
        _compress(checkpoint("llama"), tmp_path / "out", NAMED["int8"])
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    _compress(checkpoint("llama"), tmp_path / "out", NAMED["int8"])


def test_too_small_a_disk_is_refused_before_any_work(
    checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1))
    with pytest.raises(NotEnoughDisk, match="1 B left"):
        _compress(checkpoint("llama"), tmp_path / "out", NAMED["int8"])
    assert list(tmp_path.iterdir()) == []


def test_files_that_do_not_hold_what_was_made_are_not_put_in_place(
    checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = tensors_of

    def damaged(layer: Any) -> Any:
        tensors = original(layer)
        name = next((name for name in tensors if name.endswith(".codes")), None)
        if name is not None:  # the ends have none
            tensors[name] = tensors[name].flip(0)
        return tensors

    monkeypatch.setattr(run, "tensors_of", damaged)
    with pytest.raises(InternalError, match="other logits"):
        _compress(checkpoint("llama"), tmp_path / "out", NAMED["int8"])
    assert not (tmp_path / "out").exists()


def test_texts_of_random_characters_are_refused_by_a_model_that_knows_better(tmp_path: Path) -> None:
    random = torch.Generator().manual_seed(0)
    characters = torch.randint(0x4E00, 0x9000, (64, 400), generator=random).tolist()
    texts = [json.dumps({"text": "".join(map(chr, line))}) for line in characters]
    (tmp_path / "noise.jsonl").write_text("\n".join(texts))
    with pytest.raises(CalibrationUnfit, match="no better than the mere frequency"):
        _compress(
            resolve_model("penstock-mini"),
            tmp_path / "out",
            NAMED["w4a16-gptq"],
            calibration=CalibrationOptions(path=tmp_path / "noise.jsonl", num_samples=16),
        )
    assert not (tmp_path / "out").exists()


def test_what_is_compressed_already_is_refused(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    _compress(checkpoint("llama"), tmp_path / "out", NAMED["int8"])
    with pytest.raises(ModelUnreadable, match="quantized already"):
        _compress(tmp_path / "out", tmp_path / "again", NAMED["int8"])
    with pytest.raises(InvalidSetting, match="exists"):
        _compress(checkpoint("llama"), tmp_path / "out", NAMED["int8"])
