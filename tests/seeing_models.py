"""Tiny random checkpoints of every family that sees, made with transformers, which is also the oracle."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from penstock.images.processor import Expansion, Processor
from penstock.protocol import Picture
from tests.tiny_models import SHAPE, write_tokenizer

IMAGE_ID = 300
"""The placeholder's, in every tiny model"""

_TOWER: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "initializer_range": 0.3,
}
_CLIP = {**_TOWER, "model_type": "clip_vision_model", "image_size": 56, "patch_size": 14}
_SIGLIP = {**_TOWER, "model_type": "siglip_vision_model", "image_size": 44, "patch_size": 8}
_CLIP_MEAN, _CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
_CROPPED = {
    "size": {"shortest_edge": 56},
    "crop_size": {"height": 56, "width": 56},
    "image_mean": _CLIP_MEAN,
    "image_std": _CLIP_STD,
}


@dataclass(frozen=True, kw_only=True)
class Seeing:
    """What a tiny checkpoint is made of."""

    prefix: str
    """Of transformers' class"""
    image_processor: str
    """Class of transformers', whose Pillow variant prepares images"""
    image: dict[str, Any]
    """Its settings"""
    vision: dict[str, Any]
    """vision_config"""
    text: str = "llama"
    """text_config's model_type"""
    differences: dict[str, Any] = field(default_factory=dict)
    """Of the outer configuration"""
    text_differences: dict[str, Any] = field(default_factory=dict)
    processor: dict[str, Any] = field(default_factory=dict)
    """processor_config.json, beside what the image processor writes"""
    tokens: dict[str, int] = field(default_factory=lambda: {"<image>": IMAGE_ID})


SEEING: dict[str, Seeing] = {
    "llava": Seeing(prefix="Llava", image_processor="CLIPImageProcessor", image=_CROPPED, vision=_CLIP),
    "llava-siglip": Seeing(
        prefix="Llava",
        image_processor="SiglipImageProcessor",
        image={"size": {"height": 44, "width": 44}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3},
        vision=_SIGLIP,
        text="qwen2",
        differences={"vision_feature_select_strategy": "full", "vision_feature_layer": -1},
    ),
    "llava-padded": Seeing(
        prefix="Llava",
        image_processor="LlavaImageProcessor",
        image={**_CROPPED, "do_pad": True, "resample": 2},
        vision=_CLIP,
        text="mistral",
        differences={
            "vision_feature_layer": [0, -2, 1],
            "multimodal_projector_bias": False,
            "projector_hidden_act": "gelu_pytorch_tanh",
        },
    ),
}


def make_seeing_checkpoint(
    path: Path, family: str = "llava", *, rename: Callable[[str], str] | None = None, **text: Any
) -> Path:
    """Write a random checkpoint of ``family`` that sees, with a byte tokenizer, to directory ``path`` and return it.

    ``rename`` gives tensors the names they have in files of older versions; ``text`` is added to text_config.
    """
    seeing = SEEING[family]
    shape = {**SHAPE, "head_dim": 16, "model_type": seeing.text, **seeing.text_differences, **text}
    config = getattr(transformers, f"{seeing.prefix}Config")(
        text_config=shape,
        vision_config=seeing.vision,
        **{"image_token_index": IMAGE_ID, **seeing.differences},
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{seeing.prefix}ForConditionalGeneration")(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.copy_(
                    torch.randn_like(parameter) * 0.3 + (1.0 if "norm" in name and "bias" not in name else 0.0)
                )
            elif parameter.ndim == 4 or "position" in name or "vision" in name:
                parameter.copy_(torch.randn_like(parameter) * parameter[0].numel() ** -0.5)
    model.save_pretrained(path)
    if rename is not None:
        file = path / "model.safetensors"
        save_file({rename(name): tensor for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    upstream_image_processor(family).save_pretrained(path)
    if seeing.processor:
        (path / "processor_config.json").write_text(json.dumps(seeing.processor))
    write_tokenizer(path)
    _add_tokens(path, seeing.tokens)
    return path


def upstream_image_processor(family: str) -> Any:
    """Return transformers' own, on Pillow."""
    return getattr(transformers, f"{SEEING[family].image_processor}Pil")(**SEEING[family].image)


@lru_cache(maxsize=8)
def upstream_model(path: Path) -> Any:
    """Return transformers' model of a checkpoint, in float32."""
    with torch.inference_mode(False):
        model = transformers.AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32)
    return model.eval()


def drawing(width: int, height: int, seed: int = 0) -> Image.Image:
    """Return an image of noise in large and small spots."""
    random = np.random.default_rng(seed)
    noise = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
    spots = Image.fromarray(random.integers(0, 256, (3, 3, 3), dtype=np.uint8)).resize((width, height))
    return Image.blend(Image.fromarray(noise), spots, 0.6)


def token_ids_of(path: Path, text: str) -> list[int]:
    """Return what the checkpoint's tokenizer makes of ``text``."""
    ids: list[int] = Tokenizer.from_file(str(path / "tokenizer.json")).encode(text).ids
    return ids


def with_images(
    path: Path, processor: Processor, text: str, images: Sequence[Image.Image]
) -> tuple[list[int], list[Picture]]:
    """Return a prompt's tokens and pictures; ``text`` has an ``@`` where an image goes."""
    expansions = [processor.image(image, "auto") for image in images]
    pieces = text.split("@")
    token_ids: list[int] = token_ids_of(path, pieces[0])
    pictures: list[Picture] = []
    (placeholder,) = token_ids_of(path, processor.placeholder)
    for expansion, piece in zip(expansions, pieces[1:], strict=True):
        expanded = token_ids_of(path, expansion.text)
        pictures += _pictures(expansion, expanded, placeholder, len(token_ids))
        token_ids += expanded + token_ids_of(path, piece)
    return token_ids, pictures


def _pictures(expansion: Expansion, token_ids: list[int], placeholder: int, offset: int) -> list[Picture]:
    """Return the pictures of one image, whose text became ``token_ids``, at ``offset`` of a prompt."""
    pictures, place = [], 0
    for prepared in expansion.pictures:
        place = token_ids.index(placeholder, place)
        assert token_ids[place : place + prepared.num_tokens] == [placeholder] * prepared.num_tokens
        frames, height, width, _ = prepared.pixels.shape
        pictures.append(
            Picture(
                key=prepared.pixels.tobytes()[:32],
                offset=offset + place,
                num_tokens=prepared.num_tokens,
                pixels=prepared.pixels.tobytes(),
                shape=(frames, height, width),
                size=prepared.size,
                grid=prepared.grid,
                time_step=prepared.time_step,
            )
        )
        place += prepared.num_tokens
    assert placeholder not in token_ids[place:]
    return pictures


def _add_tokens(path: Path, tokens: dict[str, int]) -> None:
    """Give the tokenizer special ``tokens`` of these ids."""
    file = path / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(file))
    for token, token_id in sorted(tokens.items(), key=lambda item: item[1]):
        while tokenizer.get_vocab_size() < token_id:
            tokenizer.add_special_tokens([f"<unused{tokenizer.get_vocab_size()}>"])
        tokenizer.add_special_tokens([token])
    tokenizer.save(str(file))
