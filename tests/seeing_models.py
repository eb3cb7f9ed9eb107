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

FRAMES_PER_S = 2.0
"""Of every video"""

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
_GEMMA3_TOKENS = {"<image_soft_token>": IMAGE_ID, "<start_of_image>": IMAGE_ID + 1, "<end_of_image>": IMAGE_ID + 2}
_GEMMA3_TEXT: dict[str, Any] = {
    "num_hidden_layers": 4,
    "sliding_window": 24,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
    "query_pre_attn_scalar": 24,
}
_PALIGEMMA_IMAGE = {
    "size": {"height": 40, "width": 40},
    "image_mean": [0.5] * 3,
    "image_std": [0.5] * 3,
    "image_seq_length": 25,
}
_PINPOINTS = [[56, 112], [112, 56], [112, 112], [168, 56], [56, 168]]


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
    reads_whole: bool = False
    """A prompt with an image, of which there is no more than one"""


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
    "llava-next": Seeing(
        prefix="LlavaNext",
        image_processor="LlavaNextImageProcessor",
        image={**_CROPPED, "image_grid_pinpoints": _PINPOINTS},
        vision=_CLIP,
        text="mistral",
        differences={"image_grid_pinpoints": _PINPOINTS},
    ),
    "granite-vision": Seeing(
        prefix="LlavaNext",
        image_processor="LlavaNextImageProcessor",
        image={
            "size": {"height": 40, "width": 40},
            "crop_size": {"height": 40, "width": 40},
            "image_mean": [0.5] * 3,
            "image_std": [0.5] * 3,
            "image_grid_pinpoints": [[40, 80], [120, 40], [80, 80]],
        },
        vision={**_SIGLIP, "image_size": 40},
        text="granite",
        differences={
            "image_grid_pinpoints": [[40, 80], [120, 40], [80, 80]],
            "vision_feature_select_strategy": "full",
            "vision_feature_layer": [-3, -1],
        },
        text_differences={"embedding_multiplier": 12.0, "residual_multiplier": 0.22, "logits_scaling": 8.0},
    ),
    "idefics3": Seeing(
        prefix="Idefics3",
        image_processor="Idefics3ImageProcessor",
        image={"size": {"longest_edge": 96}, "max_image_size": {"longest_edge": 48}},
        vision={**_TOWER, "image_size": 48, "patch_size": 8},
        differences={"image_token_id": IMAGE_ID, "scale_factor": 3, "tie_word_embeddings": True},
    ),
    "smolvlm": Seeing(
        prefix="SmolVLM",
        image_processor="SmolVLMImageProcessor",
        image={"size": {"longest_edge": 90}, "max_image_size": {"longest_edge": 48}},
        vision={**_TOWER, "image_size": 48, "patch_size": 4},
        differences={"image_token_id": IMAGE_ID, "scale_factor": 4},
        text_differences={"tie_word_embeddings": True},
    ),
    "gemma3-vision": Seeing(
        prefix="Gemma3",
        image_processor="Gemma3ImageProcessor",
        image={"size": {"height": 48, "width": 48}},
        vision={**_SIGLIP, "image_size": 48, "vision_use_head": False},
        text="gemma3_text",
        differences={"mm_tokens_per_image": 4},
        text_differences=_GEMMA3_TEXT,
        tokens=_GEMMA3_TOKENS,
    ),
    "gemma3-crops": Seeing(
        prefix="Gemma3",
        image_processor="Gemma3ImageProcessor",
        image={
            "size": {"height": 48, "width": 48},
            "do_pan_and_scan": True,
            "pan_and_scan_min_crop_size": 24,
            "pan_and_scan_max_num_crops": 4,
            "pan_and_scan_min_ratio_to_activate": 1.2,
        },
        vision={**_SIGLIP, "image_size": 48, "vision_use_head": False},
        text="gemma3_text",
        # More tokens than the window is wide.
        differences={"mm_tokens_per_image": 36},
        text_differences=_GEMMA3_TEXT,
        tokens=_GEMMA3_TOKENS,
    ),
    "paligemma": Seeing(
        prefix="PaliGemma",
        image_processor="SiglipImageProcessor",
        image=_PALIGEMMA_IMAGE,
        vision={**_SIGLIP, "image_size": 40, "vision_use_head": False},
        text="gemma",
        differences={"projection_dim": 64},
        text_differences={"num_key_value_heads": 1},
        reads_whole=True,
    ),
    "paligemma2": Seeing(
        prefix="PaliGemma",
        image_processor="SiglipImageProcessor",
        image=_PALIGEMMA_IMAGE,
        vision={**_SIGLIP, "image_size": 40, "vision_use_head": False},
        text="gemma2",
        differences={"projection_dim": 64},
        text_differences={
            "num_hidden_layers": 3,
            # No less than a prompt of three images, and less than that with an answer.
            "sliding_window": 100,
            "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 5.0,
        },
        reads_whole=True,
    ),
}


_QWEN_IMAGE = {
    "size": {"shortest_edge": 4 * 28 * 28, "longest_edge": 20 * 28 * 28},
    "image_mean": _CLIP_MEAN,
    "image_std": _CLIP_STD,
}
_QWEN: dict[str, Any] = {
    "image_processor": "Qwen2VLImageProcessor",
    "image": _QWEN_IMAGE,
    "text_differences": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
    },
    "differences": {"image_token_id": IMAGE_ID, "video_token_id": 301},
    "tokens": {"<|image_pad|>": IMAGE_ID, "<|video_pad|>": 301, "<|vision_start|>": 302, "<|vision_end|>": 303},
}

THREE_AXES: dict[str, Seeing] = {
    "qwen2-vl": Seeing(
        prefix="Qwen2VL",
        text="qwen2_vl_text",
        vision={
            "depth": 2,
            "embed_dim": 48,
            "hidden_size": 64,
            "num_heads": 3,
            "mlp_ratio": 2,
            "initializer_range": 0.1,
        },
        **_QWEN,
    ),
    "qwen2.5-vl": Seeing(
        prefix="Qwen2_5_VL",
        text="qwen2_5_vl_text",
        vision={
            "depth": 3,
            "hidden_size": 48,
            "out_hidden_size": 64,
            "intermediate_size": 76,
            "num_heads": 3,
            "window_size": 56,
            "fullatt_block_indexes": [1],
            "tokens_per_second": 2,
            "initializer_range": 0.1,
        },
        **_QWEN,
    ),
}
"""Families whose positions are in time, row and column; they see videos too."""


def make_seeing_checkpoint(
    path: Path, family: str = "llava", *, rename: Callable[[str], str] | None = None, **text: Any
) -> Path:
    """Write a random checkpoint of ``family`` that sees, with a byte tokenizer, to directory ``path`` and return it.

    ``rename`` gives tensors the names they have in files of older versions; ``text`` is added to text_config.
    """
    seeing = (SEEING | THREE_AXES)[family]
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
            elif parameter.ndim == 4 or any(part in name for part in ("position", "vision", "projector", "connector")):
                parameter.copy_(torch.randn_like(parameter) * parameter[0].numel() ** -0.5)
            assert parameter.std() > 0.01, f"{name} would hide what is wrong with it"
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
    seeing = (SEEING | THREE_AXES)[family]
    return getattr(transformers, f"{seeing.image_processor}Pil")(**seeing.image)


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
    path: Path, processor: Processor, text: str, images: Sequence[Image.Image | list[Image.Image]]
) -> tuple[list[int], list[Picture]]:
    """Return a prompt's tokens and pictures; ``text`` has an ``@`` where an image goes, or the frames of a video."""
    expansions = [
        processor.image(image, "auto") if isinstance(image, Image.Image) else processor.video(image, FRAMES_PER_S)
        for image in images
    ]
    pieces = text.split("@")
    token_ids: list[int] = token_ids_of(path, pieces[0])
    pictures: list[Picture] = []
    for expansion, piece in zip(expansions, pieces[1:], strict=True):
        pictures += pictures_of(path, processor, expansion, offset=len(token_ids))
        token_ids += token_ids_of(path, expansion.text) + token_ids_of(path, piece)
    return token_ids, pictures


def pictures_of(path: Path, processor: Processor, expansion: Expansion, *, offset: int = 0) -> list[Picture]:
    """Return the pictures of one image or video, at ``offset`` of a prompt."""
    is_video = processor.video_placeholder is not None and processor.video_placeholder in expansion.text
    stands_for = processor.video_placeholder if is_video else processor.placeholder
    (placeholder,), token_ids = token_ids_of(path, stands_for or ""), token_ids_of(path, expansion.text)
    pictures: list[Picture] = []
    place = 0
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
