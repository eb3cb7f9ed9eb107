"""A checkpoint's files: what they are called, hold and where. No torch: a plain one is served without it."""

import ctypes
import json
import math
import mmap
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from penstock.errors import ModelUnreadable

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


def weight_files(path: Path) -> list[Path]:
    """Return the safetensors files of the model in directory ``path``.

    Raises ``ModelUnreadable`` if there are none or one that the index names is missing.
    """
    index = path / _INDEX
    if index.is_file():
        try:
            names = sorted({str(name) for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ModelUnreadable(f"{index} is not an index of shards: {error!r}; fetch the file again") from error
        for name in names:
            if Path(name).name != name or not (path / name).is_file():
                raise ModelUnreadable(f"{index} names the shard {name}, which is not there; fetch it")
        return [path / name for name in names]
    if (path / _SINGLE).is_file():
        return [path / _SINGLE]
    others = sorted(file.name for file in path.glob("*.bin"))
    hint = f"only {others[0]}; convert it to safetensors" if others else "no weights"
    raise ModelUnreadable(f"{path} holds neither {_SINGLE} nor {_INDEX}: there are {hint}")


_SEEING = ("vision_tower", "vision_model", "multi_modal_projector", "connector", "visual", "image_newline")
_RENAMES = (
    (re.compile(rf"model\.(?=({'|'.join(('language_model', 'text_model', *_SEEING))})\b)"), ""),
    (re.compile(r"(language_model|text_model)\.lm_head\b"), "lm_head"),
    (re.compile(r"(language_model\.model|language_model|text_model)\."), "model."),
    (re.compile(r"(vision_tower\.vision_model|vision_tower|vision_model)\."), "vision_tower."),
)


def plain_name(name: str) -> str:
    """Return what models ask for as what a checkpoint calls ``name``.

    Where a decoder is part of a larger model, versions of transformers have put different prefixes before its tensors'
    names, and before the others'. Without them a decoder's are those of a model that is text alone.
    """
    for pattern, prefix in _RENAMES:
        match = pattern.match(name)
        if match is not None:
            name = prefix + name[match.end() :]
    return name


def is_of_seeing(name: str) -> bool:
    """Return whether the tensor of this plain name belongs to a vision encoder."""
    return name.split(".", 1)[0] in _SEEING


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where in its file a tensor is."""

    dtype: str
    """As safetensors calls it"""
    shape: tuple[int, ...]
    begin: int

    @property
    def num_elements(self) -> int:
        """Return how many numbers it has."""
        return math.prod(self.shape)


class MappedFile:
    """A safetensors file in memory, privately: nothing is read until it is used.

    Format: https://github.com/huggingface/safetensors: the header's length in 8 bytes, the header, the tensors.
    """

    def __init__(self, path: Path) -> None:
        """Raises ``OSError`` or ``ValueError`` for a file that cannot be."""
        with path.open("rb") as file:
            # Private and writable, as buffers are that torch takes; nobody writes.
            self.buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.buffer))
        begin = 8 + int.from_bytes(self.buffer[:8], "little")
        header = json.loads(self.buffer[8:begin])
        self.tensors: dict[str, StoredTensor] = {}
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            first, end = entry["data_offsets"]
            tensor = StoredTensor(entry["dtype"], tuple(entry["shape"]), begin + first)
            if not 0 <= first <= end <= len(self.buffer) - begin:
                raise ValueError(f"{name} is not within the file")
            each = ELEMENT_BYTES.get(tensor.dtype)
            if each is not None and (tensor.num_elements * each != end - first or tensor.begin % each):
                raise ValueError(f"{name} is of another size than its shape's, or between two numbers")
            self.tensors[name] = tensor


ELEMENT_BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}
"""Of the dtypes that are taken from a mapped file"""


def missing(path: Path, name: str) -> ModelUnreadable:
    """Return what is wrong with a model in ``path`` that has no tensor ``name``."""
    return ModelUnreadable(
        f"{path} has no tensor {name}: the checkpoint is incomplete, or of another architecture than its config.json "
        "says"
    )


def check_shape(file: Path, name: str, shape: Sequence[int], wanted: Sequence[int]) -> None:
    """Raise ``ModelUnreadable`` unless the tensor ``name`` of ``file`` is of the shape that is ``wanted``."""
    if tuple(shape) != tuple(wanted):
        raise ModelUnreadable(
            f"{file}: {name} is {list(shape)}, and config.json makes it {list(wanted)}; the two do not belong together"
        )
