"""Models that see: their parts are treated each in its way, and what is written sees as it did."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from penstock.compress.auto.search import Goal, Search
from penstock.compress.auto.sensitivity import measure
from penstock.compress.calibration.pictures import Pictures, text_follows
from penstock.compress.calibration.stream import LayerStream
from penstock.compress.calibration.texts import CalibrationOptions
from penstock.compress.checkpoint import Checkpoint
from penstock.compress.recipe import NAMED, Recipe, parse_recipe
from penstock.compress.run import Compression, CompressOptions
from penstock.compress.units import units_of
from penstock.compress.work import WorkDirectory
from penstock.errors import CalibrationUnfit, InvalidRecipe
from penstock.images.families import load_processor
from penstock.kernels import ops_for
from penstock.models import read_config
from penstock.models.decoder import load_model
from penstock.models.vision import Inserted, RotaryPositions
from penstock.models.vision.load import load_vision
from penstock.models.vision.visible import seen_both_ways, visible_tokens
from penstock.models.weights import Weights
from penstock.protocol import Picture
from tests.packing import layout_of
from tests.seeing_models import SEEING, THREE_AXES, drawing, make_seeing_checkpoint, upstream_model, with_images

FEW = CalibrationOptions(num_samples=6, length=48, force=True)
_ONE_UNIT = parse_recipe("steps: [{match: model.layers.0.mlp.down_proj, method: rtn, bits: 8, group: null}]")


def _compression(model: Path, out: Path, recipe: Recipe, **options: Any) -> Compression:
    options = {"calibration": FEW, **options}
    return Compression(CompressOptions(model=model, out=out, recipe=recipe, **options))


@torch.inference_mode()
def _seen(path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Return features of an image, and logits of a prompt that shows it."""
    encoder, processor = load_vision(path, "float32"), load_processor(path)
    assert encoder is not None
    assert processor is not None
    token_ids, pictures = with_images(path, processor, "What is @?", [drawing(60, 50)])
    return torch.cat(encoder.encode(pictures)), _logits(path, token_ids, pictures)


@torch.inference_mode()
def _logits(path: Path, token_ids: Sequence[int], pictures: Sequence[Picture]) -> torch.Tensor:
    model, encoder = load_model(path, dtype="float32"), load_vision(path, "float32")
    assert encoder is not None
    inserted = None
    if pictures:
        rows = [torch.arange(picture.offset, picture.offset + picture.num_tokens) for picture in pictures]
        inserted = Inserted(torch.cat(rows), torch.cat(encoder.encode(pictures)))
    size, blocks = len(token_ids), -(-len(token_ids) // 16)
    layout = layout_of([size], [size], [list(range(blocks))], 16)
    vision = model.config.vision
    assert vision is not None
    if vision.has_three_axes:
        layout = replace(layout, positions=torch.from_numpy(RotaryPositions(pictures).of(0, size)))
    if vision.sees_both_ways and pictures:
        # Words behind an image that calibration shows stand for an answer.
        extents = seen_both_ways(vision, pictures, pictures[-1].offset + pictures[-1].num_tokens)
        layout = replace(layout, visible=torch.from_numpy(visible_tokens(extents, 0, size)))
    hidden = model.forward(torch.tensor(token_ids), layout, model.new_cache(blocks, 16), inserted=inserted)
    return model.logits(hidden)


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
    encoder = load_vision(source, "float32")
    assert encoder is not None
    coded = {name for name, module in theirs.named_modules() if hasattr(module, "weight_scale")}
    assert any("vision" in name for name in coded)
    assert len(pictures) > 0
    assert _error(features, torch.cat(encoder.encode(pictures))) < 0.1


def _write_pairs(directory: Path) -> Path:
    lines: list[dict[str, Any]] = []
    for i in range(6):
        drawing(40 + i, 60, seed=i).save(directory / f"{i}.png")
        text = f"what the {i}th drawing of some spots and noise shows, in as many words as it takes to say"
        pair = {"image": f"{i}.png", "text": text}
        parts = [{"type": "image", "image": f"{i}.png"}, {"type": "text", "text": text}]
        lines.append({"messages": [{"role": "user", "content": parts}]} if i == 3 else pair)
    lines.append({"text": "nothing to see in this line, which is as long as the others are, more or less, all in all"})
    file = directory / "pairs.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    return file


SHOWN = ["llava", "llava-next", "granite-vision", "idefics3", "gemma3-crops", "paligemma2", *THREE_AXES]


@pytest.mark.parametrize("family", SHOWN)
def test_calibration_sees_what_the_model_is_shown(
    family: str, seeing_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    source, out = seeing_checkpoint(family), tmp_path / "out"
    calibration = replace(FEW, path=_write_pairs(tmp_path), num_samples=7, length=64)
    compression = _compression(source, out, NAMED["vlm-mixed"], calibration=calibration)
    found = compression.calibration
    shown = found.texts.pictures
    assert sum(map(bool, shown)) == 6
    stream = LayerStream(
        read_config(source),
        Checkpoint(source),
        found.sequences,
        ops_for("float32"),
        pictures=Pictures(source, shown),
    )
    with torch.inference_mode():
        file = stream.run_through(tmp_path / "hidden")
        for (_, logits), ids, pictures in zip(stream.finished(file), found.sequences, shown, strict=True):
            torch.testing.assert_close(logits, _logits(source, ids, pictures), atol=1e-3, rtol=1e-3)
    report = compression.run()
    assert report.largest_difference < 1e-4
    assert report.kl > 0
    texts = replace(calibration, force=True, path=None)
    other = _compression(source, tmp_path / "texts", NAMED["vlm-mixed"], calibration=texts)
    assert other.calibration.digest != found.digest


@pytest.mark.parametrize("family", ["llava", "gemma3-vision", "qwen2-vl"])
@torch.inference_mode()
def test_units_are_measured_by_what_is_said_of_images(
    family: str, seeing_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    source = seeing_checkpoint(family)
    calibration = replace(FEW, path=_write_pairs(tmp_path), num_samples=7, length=64)
    compression = _compression(source, tmp_path / "one", _ONE_UNIT, calibration=calibration)
    compression.run()
    texts, vision = compression.calibration.texts, read_config(source).vision
    checkpoint = Checkpoint(source)
    units = [unit for unit in units_of(checkpoint.config) if unit.label.endswith("0.mlp.down_proj")]
    work = WorkDirectory(tmp_path / "out", {}, restart=False)
    row, *_ = measure(checkpoint, units, texts, texts, work, lambda what, done, total: None)
    kl, count = 0.0, 0
    for ids, pictures in zip(*texts, strict=True):
        speaks = torch.cat([text_follows(torch.tensor(ids), vision), torch.tensor([True])])
        after, before = (_logits(path, ids, pictures)[speaks].log_softmax(-1) for path in (tmp_path / "one", source))
        kl += F.kl_div(after, before, reduction="sum", log_target=True).item()
        count += len(before)
    assert row.kl == pytest.approx(kl / count, rel=0.03)


def test_a_recipe_is_found_on_images(seeing_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    source = seeing_checkpoint("gemma3-vision")
    calibration = replace(FEW, path=_write_pairs(tmp_path), num_samples=4, length=64)
    options = CompressOptions(model=source, out=tmp_path / "out", recipe=NAMED["int8"], calibration=calibration)
    reach = Search(options, Goal(max_loss=0.0))
    target = (reach.smallest_bytes + reach.largest_bytes) // 2
    search = Search(options, Goal(target_bytes=target))
    found = search.run()
    assert any(search.calibration.texts.pictures)
    assert Compression(replace(options, recipe=found.recipe)).run().bytes_after <= target
    assert search.increase(options.out) > -1


@pytest.mark.parametrize(
    ("family", "lines", "complaint"),
    [
        ("llama", '{"image": "a.png", "text": "x"}', "sees no images"),
        ("llava", '{"image": "a.png", "text": "x"}', r"line 1: .*a\.png cannot be read"),
        ("llava", '{"image": "broken.png", "text": "x"}', "line 1: .*broken.png: "),
        ("llava", '{"image": 5, "text": "x"}', "an image is a file's name"),
    ],
)
def test_images_that_cannot_be_taken_are_refused_by_line(
    family: str,
    lines: str,
    complaint: str,
    checkpoint: Callable[[str], Path],
    seeing_checkpoint: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    (tmp_path / "broken.png").write_bytes(b"not an image")
    (tmp_path / "pairs.jsonl").write_text(lines)
    source = seeing_checkpoint(family) if family in SEEING else checkpoint(family)
    with pytest.raises(CalibrationUnfit, match=complaint):
        _compression(
            source, tmp_path / "out", NAMED["w4a16-gptq"], calibration=replace(FEW, path=tmp_path / "pairs.jsonl")
        )


@pytest.mark.parametrize("family", ["llava", "llava-siglip", "idefics3"])
def test_the_decoder_may_be_made_smaller(family: str, seeing_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    source, out = seeing_checkpoint(family), tmp_path / "out"
    _compression(source, out, parse_recipe("remove: {layers: 1, heads: 0.5, channels: 0.35}")).run()
    config = read_config(out)
    assert (config.num_layers, config.num_kv_heads, config.intermediate_size) == (1, 1, 64)
    (features, logits), (before, _) = _seen(out), _seen(source)
    assert torch.equal(features, before)
    processor = load_processor(out)
    assert processor is not None
    token_ids, _ = with_images(out, processor, "What does it say?", [])
    with torch.no_grad():
        expected = upstream_model(out)(input_ids=torch.tensor([token_ids])).logits[0]
    torch.testing.assert_close(_logits(out, token_ids, []), expected, atol=1e-3, rtol=1e-3)
    assert logits.isfinite().all()


def test_what_is_not_there_has_no_component(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    assert read_config(checkpoint("llama")).vision is None
    with pytest.raises(InvalidRecipe, match="'vision_encoder' matches nothing"):
        _compression(checkpoint("llama"), tmp_path / "out", NAMED["vlm-mixed"])
    assert json.loads((checkpoint("llama") / "config.json").read_text())
