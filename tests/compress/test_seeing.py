"""Models that see: their parts are treated each in its way, and what is written sees as it did."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from penstock.compress.calibration.texts import CalibrationOptions
from penstock.compress.recipe import NAMED, Recipe, parse_recipe
from penstock.compress.run import Compression, CompressOptions
from penstock.errors import InvalidRecipe
from penstock.images.families import load_processor
from penstock.models import read_config
from penstock.models.decoder import load_model
from penstock.models.vision import Inserted
from penstock.models.vision.load import load_vision
from penstock.models.weights import Weights
from tests.packing import layout_of
from tests.seeing_models import SEEING, drawing, make_seeing_checkpoint, upstream_model, with_images

FEW = CalibrationOptions(num_samples=6, length=48, force=True)


def _compression(model: Path, out: Path, recipe: Recipe, **options: Any) -> Compression:
    options = {"calibration": FEW, **options}
    return Compression(CompressOptions(model=model, out=out, recipe=recipe, **options))


@torch.inference_mode()
def _seen(path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Return features of an image, and logits of a prompt that shows it."""
    model, encoder, processor = (
        load_model(path, dtype="float32"),
        load_vision(path, torch.float32),
        load_processor(path),
    )
    assert encoder is not None
    assert processor is not None
    token_ids, pictures = with_images(path, processor, "What is @?", [drawing(60, 50)])
    features = torch.cat(encoder.encode(pictures))
    rows = [torch.arange(picture.offset, picture.offset + picture.num_tokens) for picture in pictures]
    size, blocks = len(token_ids), -(-len(token_ids) // 16)
    layout = layout_of([size], [size], [list(range(blocks))], 16)
    inserted = Inserted(torch.cat(rows), features)
    hidden = model.forward(torch.tensor(token_ids), layout, model.new_cache(blocks, 16), inserted=inserted)
    return features, model.logits(hidden)


def _error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def _with_prefix(name: str) -> str:
    if "lm_head" in name:
        return name.removeprefix("language_model.")
    return f"model.{name.replace('language_model.model.', 'language_model.')}"


@pytest.mark.parametrize("family", SEEING)
def test_each_part_in_its_way(family: str, seeing_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    source, out = seeing_checkpoint(family), tmp_path / "out"
    compression = _compression(source, out, NAMED["vlm-mixed"])
    rows = {row.component: row for row in compression.coverage}
    assert rows["vision_encoder"].treatment == "rtn 8 bits, a row"
    assert rows["attention"].treatment == rows["mlp"].treatment == "gptq 4 bits, g128"
    if "gemma3" not in family:  # whose projector is kept the other way around
        assert rows["projector"].treatment == "kept"
    report = compression.run()
    assert report.bytes_after < report.bytes_before * 0.7
    with Weights(out) as stored:
        assert stored.quantized is not None
        coded = set(stored.quantized)
    assert any("vision" in name for name in coded)
    assert not any("projector" in name or "connector" in name or "lm_head" in name for name in coded)
    (features, logits), (before, logits_before) = _seen(out), _seen(source)
    if "gemma3" not in family:  # whose tiny projector is nothing but zeros
        assert 1e-5 < _error(features, before) < 0.1
    assert _error(logits, logits_before) < 0.8


@pytest.mark.parametrize("rename", [None, _with_prefix])
def test_tensors_keep_the_names_that_files_gave_them(rename: Callable[[str], str] | None, tmp_path: Path) -> None:
    source, out = make_seeing_checkpoint(tmp_path / "source", rename=rename), tmp_path / "out"
    steps = "steps: [{match: [vision_encoder, decoder, lm_head], method: rtn, group: 32}]"
    _compression(source, out, parse_recipe(f"{steps}\nkv_cache: fp8")).run()
    with Weights(source) as before, Weights(out) as stored:
        names = {name.removesuffix("_packed").removesuffix("_scale").removesuffix("_shape") for name in stored}
        layers = "language_model.model.layers" if rename is None else "model.language_model.layers"
        scales = {f"{layers}.{i}.self_attn.{part}" for i in range(2) for part in "kv"}
        assert names == set(before) | scales
        assert f"{layers}.1.self_attn.k_scale" in set(stored)
    assert _error(_seen(out)[1], _seen(source)[1]) < 0.8


@pytest.mark.parametrize("family", ["llava", "idefics3"])
@pytest.mark.filterwarnings("ignore")
def test_transformers_sees_the_same(family: str, seeing_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    source, out = seeing_checkpoint(family), tmp_path / "out"
    steps = "steps: [{match: [vision_encoder, projector], method: rtn, bits: 8, group: null}]"
    _compression(source, out, parse_recipe(steps)).run()
    processor = load_processor(out)
    assert processor is not None
    features, _ = _seen(out)
    _, pictures = with_images(out, processor, "@", [drawing(60, 50)])
    theirs = upstream_model(out)
    encoder = load_vision(source, torch.float32)
    assert encoder is not None
    coded = {name for name, module in theirs.named_modules() if hasattr(module, "weight_scale")}
    assert any("vision" in name for name in coded)
    assert len(pictures) > 0
    assert _error(features, torch.cat(encoder.encode(pictures))) < 0.1


def test_removal_is_for_models_of_text_alone(seeing_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(InvalidRecipe, match="text alone"):
        _compression(seeing_checkpoint("llava"), tmp_path / "out", parse_recipe("remove: {layers: 1}"))


def test_what_is_not_there_has_no_component(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    assert read_config(checkpoint("llama")).vision is None
    with pytest.raises(InvalidRecipe, match="'vision_encoder' matches nothing"):
        _compression(checkpoint("llama"), tmp_path / "out", NAMED["vlm-mixed"])
    assert json.loads((checkpoint("llama") / "config.json").read_text())
