"""How a model's vision encoder is found and loaded."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from penstock.estimate.seeing import TowerShape
from penstock.images.settings import Normalization, read_seeing_files
from penstock.json_objects import reading
from penstock.kernels import Ops, ops_for
from penstock.models.config_json import ConfigJson
from penstock.models.families import read_config
from penstock.models.files import is_of_seeing
from penstock.models.parts import Loader
from penstock.models.vision.encoder import VisionEncoder
from penstock.models.vision.gemma3 import Gemma3Encoder
from penstock.models.vision.idefics3 import Idefics3Encoder
from penstock.models.vision.llava import LlavaEncoder
from penstock.models.vision.llava_next import LlavaNextEncoder
from penstock.models.vision.paligemma import PaliGemmaEncoder
from penstock.models.vision.qwen2_vl import QwenVisionEncoder, TowerConfig, read_qwen2_5_vl, read_qwen2_vl
from penstock.models.weights import open_weights


class Family(NamedTuple):
    """How a family's encoder is loaded."""

    load: Callable[[ConfigJson, Loader, Normalization], VisionEncoder]
    shape: Callable[[ConfigJson, int], TowerShape]
    """Of a checkpoint, and the decoder's width; both raise ``ModelUnreadable``"""


def _qwen(read: Callable[[ConfigJson], TowerConfig]) -> Family:
    return Family(
        lambda raw, loader, normalization: QwenVisionEncoder(loader, read(raw), normalization),
        lambda raw, hidden_size: read(raw).shape,
    )


ENCODERS: dict[str, Family] = {
    "LlavaForConditionalGeneration": Family(LlavaEncoder, LlavaEncoder.shape),
    "LlavaNextForConditionalGeneration": Family(LlavaNextEncoder, LlavaEncoder.shape),
    "Gemma3ForConditionalGeneration": Family(Gemma3Encoder, Gemma3Encoder.shape),
    "PaliGemmaForConditionalGeneration": Family(PaliGemmaEncoder, Gemma3Encoder.shape),
    "Idefics3ForConditionalGeneration": Family(Idefics3Encoder, Idefics3Encoder.shape),
    "SmolVLMForConditionalGeneration": Family(Idefics3Encoder, Idefics3Encoder.shape),
    "Qwen2VLForConditionalGeneration": _qwen(read_qwen2_vl),
    "Qwen2_5_VLForConditionalGeneration": _qwen(read_qwen2_5_vl),
}
"""By the name in config.json's ``architectures``"""


def load_vision(path: Path, dtype: str, ops: Ops | None = None) -> VisionEncoder | None:
    """Load what the model in directory or GGUF file ``path`` sees with; None if it sees nothing.

    Weights run in ``dtype``, the decoder's; features come in the dtype that ``ops`` compute activations in. Give
    ``ops`` that quantize, and the encoder is quantized; the default is exact.

    Raises ``ModelUnreadable`` if the checkpoint is incomplete or broken.
    """
    config = read_config(path)
    if config.vision is None:
        return None
    with torch.inference_mode(), open_weights(path) as weights:
        return make_encoder(path, Loader(config, weights, dtype, ops or ops_for(dtype), adaptable=False))


def make_encoder(path: Path, loader: Loader) -> VisionEncoder | None:
    """Return what the model in directory ``path`` sees with, its tensors taken from ``loader``; see ``load_vision``."""
    files = read_seeing_files(path)
    if loader.config.vision is None or files is None:
        return None
    raw = ConfigJson(dict(files.model.values), path / "config.json", {})
    with reading(path / "config.json"):
        return ENCODERS[loader.config.architecture].load(raw, loader, files.image.normalization())


def read_tower_shape(path: Path) -> TowerShape:
    """Return the shape of what the model in directory ``path``, which sees, sees with. Raises ``ModelUnreadable``."""
    config, files = read_config(path), read_seeing_files(path)
    assert files is not None, "it was asked of a model that sees"
    raw = ConfigJson(dict(files.model.values), path / "config.json", {})
    with reading(path / "config.json"):
        return ENCODERS[config.architecture].shape(raw, config.hidden_size)


def count_vision_parameters(path: Path) -> int:
    """Return how many parameters the checkpoint in directory ``path`` has for seeing, from the files' headers alone."""
    with open_weights(path) as weights:
        return sum(num_parameters for name, num_parameters, _ in weights.sizes() if is_of_seeing(name))
