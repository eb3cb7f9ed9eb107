"""How each family prepares images: one module a family, and the table that finds it."""

from collections.abc import Callable
from pathlib import Path

from penstock.images.config import ImageConfig
from penstock.images.families.gemma3 import Gemma3Processor
from penstock.images.families.idefics3 import Idefics3Processor
from penstock.images.families.llava import LlavaProcessor
from penstock.images.families.llava_next import LlavaNextProcessor
from penstock.images.families.paligemma import PaliGemmaProcessor
from penstock.images.families.qwen2_vl import qwen2_5_vl_processor, qwen2_vl_processor
from penstock.images.processor import Processor
from penstock.images.settings import SeeingFiles, read_seeing_files
from penstock.json_objects import reading

FAMILIES: dict[str, Callable[[SeeingFiles], Processor]] = {
    "LlavaForConditionalGeneration": LlavaProcessor,
    "LlavaNextForConditionalGeneration": LlavaNextProcessor,
    "Gemma3ForConditionalGeneration": Gemma3Processor,
    "PaliGemmaForConditionalGeneration": PaliGemmaProcessor,
    "Idefics3ForConditionalGeneration": Idefics3Processor,
    "SmolVLMForConditionalGeneration": Idefics3Processor,
}
"""By the name in config.json's ``architectures``: those that bring images to sizes of theirs"""
OWN_SHAPES: dict[str, Callable[[SeeingFiles, int], Processor]] = {
    "Qwen2VLForConditionalGeneration": qwen2_vl_processor,
    "Qwen2_5_VLForConditionalGeneration": qwen2_5_vl_processor,
}
"""Those that see images in their own shape, of at most so many pixels"""


def load_processor(path: Path, config: ImageConfig | None = None) -> Processor | None:
    """Return how the model in directory or GGUF file ``path`` wants images; None: it sees none.

    ``config`` bounds those in their own shape. Raises ``ModelUnreadable`` if a file is broken, or asks for what is not
    implemented.
    """
    files = read_seeing_files(path)
    if files is None:
        return None
    names = files.model.values.get("architectures")
    with reading(path / "preprocessor_config.json"):
        for name in names if isinstance(names, list) else ():
            if name in FAMILIES:
                return FAMILIES[name](files)
            if name in OWN_SHAPES:
                return OWN_SHAPES[name](files, (config or ImageConfig()).max_seen_pixels)
    return None
