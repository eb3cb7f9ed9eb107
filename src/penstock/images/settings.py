"""How a checkpoint says it wants images: the files beside its config.json, read key by key."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL.Image import Resampling

from penstock.errors import ModelUnreadable
from penstock.gguf import is_gguf
from penstock.json_objects import read_json_object


@dataclass(frozen=True, slots=True)
class Normalization:
    """What an encoder makes of a channel's value v: (v * scale - mean) / std."""

    scale: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


class ImageSettings:
    """The values of one object. Methods raise ``ModelUnreadable`` for what cannot be honoured."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        """Take ``values``, which stand at ``where``; what is null is not there."""
        self.values = {key: value for key, value in values.items() if value is not None}
        self._where = where

    def part(self, key: str) -> "ImageSettings":
        """Return the object under ``key``, empty where there is none."""
        value = self.values.get(key)
        if not isinstance(value, Mapping | None):
            raise self.bad(key, value, "an object of settings")
        return ImageSettings(value or {}, f"{self._where}: {key}")

    def flag(self, key: str, default: bool = False) -> bool:
        """Return whether ``key`` is set."""
        value = self.values.get(key)
        return default if value is None else bool(value)

    def integer(self, key: str, default: int | None = None) -> int:
        """Return a positive integer."""
        value = self.values.get(key)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.bad(key, value, "a positive integer")
        return value

    def text(self, key: str, default: str) -> str:
        """Return a text, or the content of a token that is written as an object."""
        value = self.values.get(key)
        value = value.get("content") if isinstance(value, Mapping) else default if value is None else value
        if not isinstance(value, str) or not value:
            raise self.bad(key, value, "a text")
        return value

    def size(self, key: str) -> dict[str, int]:
        """Return height and width, or an edge's length by its name."""
        value = self.values.get(key)
        if isinstance(value, int):  # as older files have it
            return {"shortest_edge": value} if key == "size" else {"height": value, "width": value}
        known = ("height", "width", "shortest_edge", "longest_edge")
        value = value if isinstance(value, Mapping) else {}
        given = {name: length for name, length in value.items() if length is not None}
        if not given or not all(name in known and isinstance(n, int) and n > 0 for name, n in given.items()):
            raise self.bad(key, self.values.get(key), f"lengths under some of {', '.join(known)}")
        return given

    def height_and_width(self, key: str) -> tuple[int, int]:
        """Return a size that has both."""
        size = self.size(key)
        if set(size) != {"height", "width"}:
            raise self.bad(key, self.values.get(key), "a height and a width")
        return size["height"], size["width"]

    def resampling(self) -> Resampling:
        """Return the filter that images are resized with."""
        value = self.values.get("resample", Resampling.BICUBIC.value)
        if value not in tuple(Resampling):
            raise self.bad("resample", value, "a number of one of Pillow's filters")
        return Resampling(value)

    def normalization(self) -> Normalization:
        """Return what the encoder does to pixels."""
        scale = float(self.values.get("rescale_factor", 1 / 255)) if self.flag("do_rescale", True) else 1.0
        if not self.flag("do_normalize", True):
            return Normalization(scale, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
        return Normalization(scale, self._three("image_mean"), self._three("image_std"))

    def _three(self, key: str) -> tuple[float, float, float]:
        value = self.values.get(key)
        if not isinstance(value, list) or len(value) != 3 or not all(isinstance(v, int | float) for v in value):
            raise self.bad(key, value, "three numbers, of red, green and blue")
        red, green, blue = map(float, value)
        return red, green, blue

    def bad(self, key: str, value: object, wanted: str) -> ModelUnreadable:
        """Return the error that says ``key`` cannot be ``value``."""
        return ModelUnreadable(f"{self._where}: {key} is {value!r}, and Penstock needs {wanted}")


@dataclass(frozen=True, slots=True)
class SeeingFiles:
    """All that a checkpoint says about how it sees."""

    model: ImageSettings
    """config.json"""
    processor: ImageSettings
    """processor_config.json: tokens, and how many an image becomes"""
    image: ImageSettings
    """preprocessor_config.json, which version 5 of transformers writes into the former: pixels"""
    video: ImageSettings
    """video_preprocessor_config.json, likewise; where there is none, the same as of images"""


def read_seeing_files(path: Path) -> SeeingFiles | None:
    """Return what the model in directory ``path`` says; None for a GGUF file. Raises ``ModelUnreadable``."""
    if is_gguf(path):
        return None
    names = ("config.json", "processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
    model, processor, image, video = (ImageSettings(read_json_object(path / name), str(path / name)) for name in names)
    image = image if image.values else processor.part("image_processor")
    video = video if video.values else processor.part("video_processor")
    return SeeingFiles(model, processor, image, video if video.values else image)
