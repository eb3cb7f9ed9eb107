"""Qwen2-VL and Qwen2.5-VL against transformers on tiny random weights: features, logits and greedy tokens."""

import json
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from penstock.errors import ModelUnreadable
from penstock.kernels import BatchLayout, CPUOps, Ops, ReferenceOps
from penstock.models.decoder import count_parameters, load_model
from penstock.models.families import read_config
from penstock.models.vision import Inserted, RotaryPositions, VisionEncoder
from penstock.models.vision.load import count_vision_parameters, load_vision
from penstock.protocol import Picture
from tests.kernels.backends import instruction_sets, needs_native, using
from tests.seeing_models import (
    THREE_AXES,
    make_seeing_checkpoint,
    upstream_model,
)
from tests.three_axes import prompt

BLOCK = 4
families = pytest.mark.parametrize("family", THREE_AXES)
backends = pytest.mark.parametrize(
    ("ops", "isa"),
    [
        pytest.param(ReferenceOps(), None, id="reference"),
        *(pytest.param(CPUOps(), isa, id=isa) for isa in instruction_sets()),
    ],
)


def load(path: Path, ops: Ops | None = None) -> VisionEncoder:
    encoder = load_vision(path, "float32", ops)
    assert encoder is not None
    return encoder


def inserted(pictures: list[Picture], features: list[Tensor], start: int, end: int) -> Inserted | None:
    """Return the features that rows [start, end) of the prompt take."""
    rows, taken = [], []
    for picture, some in zip(pictures, features, strict=True):
        first, last = max(picture.offset, start), min(picture.offset + picture.num_tokens, end)
        if first < last:
            rows.append(torch.arange(first - start, last - start))
            taken.append(some[first - picture.offset : last - picture.offset])
    return Inserted(torch.cat(rows), torch.cat(taken)) if rows else None


def layout_of(start: int, end: int, blocks: list[int], positions: np.ndarray) -> BatchLayout:
    table = [blocks[: -(-end // BLOCK)]]
    return BatchLayout.pack([end - start], [end], table, BLOCK, positions=positions)


@families
@backends
@torch.inference_mode()
def test_features_equal_transformers(
    family: str, ops: Ops, isa: str | None, seeing_checkpoint: Callable[[str], Path]
) -> None:
    asked = prompt(seeing_checkpoint(family))
    with using(isa, 2):
        features = load(asked.path, ops).encode(asked.pictures)
    inputs, upstream = asked.upstream(), upstream_model(asked.path)
    images = upstream.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"]).pooler_output
    videos = upstream.get_video_features(inputs["pixel_values_videos"], inputs["video_grid_thw"]).pooler_output
    expected = [*images[:4], videos[0], images[4], videos[1]]
    for found, wanted in zip(features, expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)


@families
@torch.inference_mode()
def test_no_bit_of_a_picture_depends_on_its_neighbours(
    family: str, seeing_checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = prompt(seeing_checkpoint(family))
    encoder = load(asked.path)
    together = encoder.encode(asked.pictures)
    for picture, features in zip(asked.pictures, together, strict=True):
        assert torch.equal(encoder.encode([picture])[0], features)
    monkeypatch.setattr("penstock.models.vision.attention.ROWS_AT_ONCE", 24)
    for features, in_parts in zip(together, encoder.encode(asked.pictures), strict=True):
        assert torch.equal(features, in_parts)
    assert encoder.encode([]) == []


@families
@backends
@pytest.mark.parametrize("chunks", [[1000], [13, 1, 1, 9, 20, 1000]], ids=["whole", "chunked"])
@torch.inference_mode()
def test_logits_and_greedy_tokens_equal_transformers(
    family: str, ops: Ops, isa: str | None, chunks: list[int], seeing_checkpoint: Callable[[str], Path]
) -> None:
    asked = prompt(seeing_checkpoint(family))
    T, num_new = len(asked.token_ids), 8
    upstream, inputs = upstream_model(asked.path), asked.upstream()
    positions = RotaryPositions(asked.pictures)
    blocks = list(range(-(-(T + num_new) // BLOCK)))
    with using(isa, 2):
        model = load_model(asked.path, dtype="float32", ops=ops)
        cache, features = model.new_cache(len(blocks), BLOCK), load(asked.path, ops).encode(asked.pictures)
        parts, start = [], 0
        for chunk in chunks:
            end = min(start + chunk, T)
            layout = layout_of(start, end, blocks, positions.of(start, end))
            seen = inserted(asked.pictures, features, start, end)
            hidden = model.forward(torch.tensor(asked.token_ids[start:end]), layout, cache, inserted=seen)
            parts.append(model.logits(hidden))
            start = end
        logits = torch.cat(parts)
        torch.testing.assert_close(logits, upstream(**inputs).logits[0], atol=1e-4, rtol=0)
        replay, generated = model.replay(cache, BLOCK), [int(logits[-1].argmax())]
        for end in range(T + 1, T + num_new):
            layout = layout_of(end - 1, end, blocks, positions.of(end - 1, end))
            hidden = model.forward(torch.tensor(generated[-1:]), layout, cache)
            if replay is not None:
                offset = positions.offset(end - 1, end)
                assert offset is not None
                table = array("i", blocks[: -(-end // BLOCK)])
                repeated = replay(generated[-1:], [1], [end], [table], [0], [offset])
                assert repeated is not None
                assert torch.equal(torch.from_numpy(repeated), hidden)
            generated.append(int(model.logits(hidden)[0].argmax()))
    output = upstream.generate(
        **inputs,
        attention_mask=torch.ones(1, T, dtype=torch.int64),
        do_sample=False,
        max_new_tokens=num_new,
        min_new_tokens=num_new,
        eos_token_id=None,
        pad_token_id=0,
    )
    assert generated == output[0, T:].tolist()


@needs_native
@families
@torch.inference_mode()
def test_text_has_the_same_bits_beside_pictures(family: str, seeing_checkpoint: Callable[[str], Path]) -> None:
    asked = prompt(seeing_checkpoint(family))
    model, features = load_model(asked.path, dtype="float32"), load(asked.path).encode(asked.pictures)
    text, T = list(range(30)), len(asked.token_ids)
    tables = [list(range(8)), list(range(8, 8 + -(-T // BLOCK)))]
    cache = model.new_cache(8 + len(tables[1]), BLOCK)
    replay = model.replay(cache, BLOCK)
    assert replay is not None
    replayed = replay(text, [30], [30], [array("i", tables[0])], [0], [0])
    assert replayed is not None
    alone = torch.from_numpy(replayed.copy())
    positions = [RotaryPositions([]).of(0, 30), RotaryPositions(asked.pictures).of(0, T)]
    layout = BatchLayout.pack([30, T], [30, T], tables, BLOCK, positions=np.concatenate(positions, axis=1))
    seen = inserted(asked.pictures, features, 0, T)
    assert seen is not None
    seen = Inserted(seen.rows + 30, seen.features)
    token_ids = torch.tensor([*text, *asked.token_ids])
    assert torch.equal(model.forward(token_ids, layout, cache, inserted=seen)[:30], alone)


@families
def test_every_parameter_is_counted_on_one_side(family: str, seeing_checkpoint: Callable[[str], Path]) -> None:
    path = seeing_checkpoint(family)
    config, encoder = read_config(path), load(path)
    assert config.vision is not None
    assert config.vision.has_three_axes
    assert sum(count_parameters(path, config).values()) == load_model(path).num_parameters
    assert encoder.num_parameters == count_vision_parameters(path)
    assert encoder.weights_bytes == 4 * encoder.num_parameters


def rewrite_config(path: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    file = path / "config.json"
    file.write_text(json.dumps(change(json.loads(file.read_text()))))


def as_on_the_hub(config: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration whose decoder's settings are outside, as the first checkpoints have it."""
    text = config.pop("text_config")
    rope = text.pop("rope_parameters")
    scaling = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    kept = {"rope_theta": rope["rope_theta"], "rope_scaling": scaling}
    return {**{key: value for key, value in text.items() if key != "model_type"}, **config, **kept}


@families
@torch.inference_mode()
def test_other_layouts_of_a_checkpoint_are_known(family: str, tmp_path: Path) -> None:
    def as_in_memory(name: str) -> str:
        if name.startswith("visual."):
            return f"model.{name}"
        return name.replace("model.", "model.language_model.", 1)

    path = make_seeing_checkpoint(tmp_path / "saved", family)
    other = make_seeing_checkpoint(tmp_path / "other", family, rename=as_in_memory)
    rewrite_config(other, as_on_the_hub)
    assert read_config(other) == read_config(path)
    asked = prompt(path)
    for expected, found in zip(*(load(each).encode(asked.pictures) for each in (path, other)), strict=True):
        assert torch.equal(expected, found)
    assert load_model(other).num_parameters == load_model(path).num_parameters


@pytest.mark.parametrize(
    ("part", "change", "complaint"),
    [
        ("text_config", {"rope_parameters": {"rope_type": "default"}}, "mrope_section is None"),
        ("text_config", {"rope_parameters": {"mrope_section": [2, 3, 4]}}, r"mrope_section is \[2, 3, 4\]"),
        ("text_config", {"rope_parameters": {"mrope_section": [9, -4, 3]}}, "sections of zero pairs or more"),
        (
            "text_config",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "mrope_section": [2, 3, 3]}},
            "angles that keep their base",
        ),
        ("vision_config", {"hidden_act": "relu"}, "vision_config.hidden_act is 'relu'"),
        ("vision_config", {"in_channels": 1}, "vision_config.in_channels is 1"),
        ("vision_config", {"num_heads": 5}, "vision_config.num_heads is 5"),
        ("vision_config", {"embed_dim": 96}, r"is \[48, 3, 2, 14, 14\], and config.json makes it"),
    ],
)
def test_what_cannot_be_run_is_refused(part: str, change: dict[str, Any], complaint: str, tmp_path: Path) -> None:
    path = make_seeing_checkpoint(tmp_path, "qwen2-vl")
    rewrite_config(path, lambda config: {**config, part: {**config[part], **change}})
    with pytest.raises(ModelUnreadable, match=complaint):
        load(path)
