"""Every family that sees against transformers on tiny random weights."""

from array import array
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from penstock.images.families import load_processor
from penstock.kernels import ops_for
from penstock.models.decoder import count_parameters, load_model
from penstock.models.families import read_config
from penstock.models.vision import Inserted
from penstock.models.vision.load import count_vision_parameters, load_vision
from penstock.models.vision.visible import seen_both_ways, visible_tokens
from penstock.protocol import Picture
from tests.kernels.backends import needs_native
from tests.packing import layout_of
from tests.seeing_models import (
    IMAGE_ID,
    SEEING,
    drawing,
    make_seeing_checkpoint,
    pictures_of,
    upstream_image_processor,
    upstream_model,
    with_images,
)

BLOCK = 4
SIZES = [(80, 60), (33, 200), (56, 56)]


def _prompt(path: Path, sizes: list[tuple[int, int]]) -> tuple[list[int], list[Picture]]:
    processor = load_processor(path)
    assert processor is not None
    images = [drawing(*size, seed=i) for i, size in enumerate(sizes)]
    return with_images(path, processor, "What is " + "@ and " * len(images) + "?", images)


def _upstream_inputs(family: str, sizes: list[tuple[int, int]]) -> dict[str, Tensor]:
    images = [drawing(*size, seed=i) for i, size in enumerate(sizes)]
    processed = upstream_image_processor(family)(images, return_tensors="pt")
    names = ("pixel_values", "image_sizes", "pixel_attention_mask")
    return {name: processed[name] for name in names if name in processed}


def _inserted(pictures: list[Picture], features: list[Tensor]) -> Inserted:
    rows = [torch.arange(picture.offset, picture.offset + picture.num_tokens) for picture in pictures]
    return Inserted(torch.cat(rows), torch.cat(features))


@pytest.mark.parametrize("family", SEEING)
@torch.inference_mode()
def test_features_equal_transformers(family: str, seeing_checkpoint: Callable[[str], Path]) -> None:
    path = seeing_checkpoint(family)
    encoder = load_vision(path, "float32")
    assert encoder is not None
    _, pictures = _prompt(path, SIZES)
    found = torch.cat(encoder.encode(pictures))
    expected = upstream_model(path).get_image_features(**_upstream_inputs(family, SIZES)).pooler_output
    # Upstream's decoder multiplies what it is given.
    expected = torch.cat([rows.flatten(0, -2) for rows in expected]) * read_config(path).inserted_scale
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("family", SEEING)
@torch.inference_mode()
def test_logits_and_greedy_tokens_equal_transformers(family: str, seeing_checkpoint: Callable[[str], Path]) -> None:
    path = seeing_checkpoint(family)
    model, encoder = load_model(path, dtype="float32"), load_vision(path, "float32")
    assert encoder is not None
    token_ids, pictures = _prompt(path, SIZES)
    upstream, inputs = upstream_model(path), _upstream_inputs(family, SIZES)
    T, num_new = len(token_ids), 8
    extents = seen_both_ways(model.config.vision, pictures, T)
    visible = torch.from_numpy(visible_tokens(extents, 0, T)) if extents else None
    if extents:
        # Of one family 1 says that a token is an image's, of the other that it does not belong to the prompt.
        is_image = torch.tensor([token_ids]) == IMAGE_ID
        inputs["token_type_ids"] = (is_image & (not SEEING[family].reads_whole)).long()
    expected = upstream(input_ids=torch.tensor([token_ids]), **inputs).logits[0]
    blocks = list(range(-(-(T + num_new) // BLOCK)))
    cache = model.new_cache(len(blocks), BLOCK)
    layout = replace(layout_of([T], [T], [blocks[: -(-T // BLOCK)]], BLOCK), visible=visible)
    inserted = _inserted(pictures, encoder.encode(pictures))
    logits = model.logits(model.forward(torch.tensor(token_ids), layout, cache, inserted=inserted))
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    generated: list[int] = []
    for end in range(T + 1, T + 1 + num_new):
        generated.append(int(logits[-1].argmax()))
        layout = layout_of([1], [end], [blocks[: -(-end // BLOCK)]], BLOCK)
        logits = model.logits(model.forward(torch.tensor(generated[-1:]), layout, cache))
    output = upstream.generate(
        input_ids=torch.tensor([token_ids]),
        attention_mask=torch.ones(1, T, dtype=torch.int64),
        **inputs,
        do_sample=False,
        max_new_tokens=num_new,
        min_new_tokens=num_new,
        eos_token_id=None,
        pad_token_id=0,
    )
    assert generated == output[0, T:].tolist()


@pytest.mark.parametrize("family", SEEING)
@torch.inference_mode()
def test_no_bit_of_a_picture_depends_on_its_neighbours(family: str, seeing_checkpoint: Callable[[str], Path]) -> None:
    path = seeing_checkpoint(family)
    encoder = load_vision(path, "float32")
    assert encoder is not None
    _, pictures = _prompt(path, [*SIZES, (200, 33), (80, 60), (1, 1)])
    for picture, together in zip(pictures, encoder.encode(pictures), strict=True):
        (alone,) = encoder.encode([picture])
        assert together.shape == (picture.num_tokens, encoder.encode([picture])[0].shape[1])
        assert torch.equal(alone, together)


@torch.inference_mode()
def test_an_image_without_tiles_ends_with_a_new_line(seeing_checkpoint: Callable[[str], Path]) -> None:
    path = seeing_checkpoint("llava-next")
    processor, encoder = load_processor(path), load_vision(path, "float32")
    assert processor is not None
    assert encoder is not None
    expansions = [processor.image(drawing(90, 70), detail) for detail in ("low", "high")]
    low, high = encoder.encode([pictures_of(path, processor, expansion)[0] for expansion in expansions])
    assert torch.equal(low[:-1], high[: len(low) - 1])
    assert torch.equal(low[-1], high[-1])


@pytest.mark.parametrize("family", SEEING)
def test_every_parameter_is_counted_on_one_side(family: str, seeing_checkpoint: Callable[[str], Path]) -> None:
    path = seeing_checkpoint(family)
    config, encoder = read_config(path), load_vision(path, "float32")
    assert encoder is not None
    assert sum(count_parameters(path, config).values()) == load_model(path).num_parameters
    # Layers after the last that is wanted are not loaded.
    assert encoder.num_parameters <= count_vision_parameters(path)
    assert encoder.weights_bytes == 4 * encoder.num_parameters


def _as_version_4(name: str) -> str:
    if name.startswith("language_model.lm_head."):
        return name.removeprefix("language_model.")
    name = name.replace("language_model.model.", "language_model.").replace(
        "vision_tower.", "vision_tower.vision_model."
    )
    return f"model.{name}"


@pytest.mark.parametrize(
    "rename", [_as_version_4, lambda name: name.replace("vision_tower.", "vision_tower.vision_model.")]
)
def test_older_names_of_tensors_are_known(rename: Callable[[str], str], tmp_path: Path) -> None:
    path, older = make_seeing_checkpoint(tmp_path / "5"), make_seeing_checkpoint(tmp_path / "4", rename=rename)
    _, pictures = _prompt(path, SIZES)
    encoders = [load_vision(each, "float32") for each in (path, older)]
    features = [torch.cat(encoder.encode(pictures)) for encoder in encoders if encoder is not None]
    assert torch.equal(*features)
    assert load_model(older).num_parameters == load_model(path).num_parameters


def test_a_model_that_reads_text_has_no_encoder(checkpoint: Callable[[str], Path]) -> None:
    assert load_vision(checkpoint("llama"), "float32") is None


@needs_native
@torch.inference_mode()
def test_steps_of_text_are_recorded(seeing_checkpoint: Callable[[str], Path]) -> None:
    model = load_model(seeing_checkpoint("llava-siglip"), dtype="float32")
    cache, other_cache = model.new_cache(2, BLOCK), model.new_cache(2, BLOCK)
    replay = model.replay(cache, BLOCK)
    assert replay is not None
    hidden = replay([3, 1, 4, 1, 5], [5], [5], [array("i", [0, 1])], [0])
    layout = layout_of([5], [5], [[0, 1]], BLOCK)
    assert hidden is not None
    assert torch.equal(torch.from_numpy(hidden), model.forward(torch.tensor([3, 1, 4, 1, 5]), layout, other_cache))


@needs_native
@pytest.mark.parametrize("quantize", ["int8", "w8a16"])
@torch.inference_mode()
def test_a_tower_can_be_quantized(quantize: str, seeing_checkpoint: Callable[[str], Path]) -> None:
    path = seeing_checkpoint("llava")
    _, pictures = _prompt(path, SIZES)
    exact, rounded = (load_vision(path, "float32", ops_for("float32", name)) for name in (None, quantize))
    assert exact is not None
    assert rounded is not None
    for expected, found in zip(exact.encode(pictures), rounded.encode(pictures), strict=True):
        assert not torch.equal(found, expected)
        assert torch.nn.functional.cosine_similarity(found, expected).min() > 0.99


@torch.inference_mode()
def test_half_precision_rounds_weights_alone(seeing_checkpoint: Callable[[str], Path]) -> None:
    path = seeing_checkpoint("llava")
    _, pictures = _prompt(path, SIZES)
    exact, half = load_vision(path, "float32"), load_vision(path, "bfloat16")
    assert exact is not None
    assert half is not None
    assert half.weights_bytes * 2 == exact.weights_bytes
    for expected, found in zip(exact.encode(pictures), half.encode(pictures), strict=True):
        assert torch.nn.functional.cosine_similarity(found, expected).min() > 0.99
