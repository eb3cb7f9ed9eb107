"""Tensors of a checkpoint, memory-mapped: nothing is read until it is used."""

import json
import math
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from penstock.errors import ModelUnreadable
from penstock.gguf import is_gguf
from penstock.json_objects import read_json_object
from penstock.models.gguf_weights import GGUFWeights
from penstock.quant import QuantizedModules, QuantizedWeight, Scheme, dequantize, read_layout

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


class TensorSource(Protocol):
    """Where a model gets its tensors."""

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return the tensor that a checkpoint would call ``name``, of ``shape``, in ``dtype``; codes are widened.

        Raises ``ModelUnreadable`` if there is none.
        """

    def take_codes(self, module: str, shape: tuple[int, int]) -> QuantizedWeight | None:
        """Return the weight of a projection by its ``module``'s name, of ``shape``, if it is kept in codes.

        None where it is not, and ``take`` has to be asked. Raises ``ModelUnreadable``.
        """


class StoredTensors(TensorSource, Protocol):
    """Tensors of a file, which knows what it holds."""

    def unused(self) -> Iterator[str]:
        """Names that nobody took."""

    def sizes(self) -> Iterator[tuple[str, int, Scheme | None]]:
        """Yield all tensors, weights in codes as one: the name models ask for, weights, and how they are quantized.

        Nothing is read.
        """


def open_weights(path: Path) -> AbstractContextManager[StoredTensors]:
    """Return the tensors of the model in directory or GGUF file ``path``."""
    return GGUFWeights(path) if is_gguf(path) else Weights(path)


class Weights:
    """All tensors of a checkpoint by name. A context manager; tensors taken from it stay valid after.

    They are taken by the names models ask for, ``plain_name``'s; whatever else is done with them goes by stored names.

    Every tensor has a mapping of its own, so that what was read and packed stops being this process's memory at once.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._files: dict[str, Path] = {}
        self._num_elements: dict[str, int] = {}
        self._unused: set[str] = set()
        self._stored_names: dict[str, str] = {}
        """Of tensors and modules, by plain names"""
        file = path / "config.json"
        quantization = read_json_object(file).get("quantization_config")
        self.quantized = QuantizedModules(read_layout(quantization, str(file)), self) if quantization else None

    def __enter__(self) -> Self:
        for file in weight_files(self._path):
            try:
                with safe_open(file, framework="pt") as handle:
                    for name in handle.keys():  # noqa: SIM118 - a handle is no dict
                        self._files[name] = file
                        self._num_elements[name] = math.prod(handle.get_slice(name).get_shape())
            except (SafetensorError, OSError) as error:
                raise ModelUnreadable(f"{file} is broken or cut short ({error}); fetch the file again") from error
        self._unused = set(self._files)
        self._stored_names = {plain_name(name): name for name in (*self._files, *(self.quantized or ()))}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing is held open."""

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def unused(self) -> Iterator[str]:
        """Names that nobody took."""
        return iter(sorted(self._unused))

    def sizes(self) -> Iterator[tuple[str, int, Scheme | None]]:
        """Yield what there is; see ``StoredTensors``."""
        parts: set[str] = set()
        for module in self.quantized or ():
            assert self.quantized is not None
            scheme, names = self.quantized.scheme(module), self.quantized.parts(module)
            # The first part has the codes, a byte each or in words.
            has_bytes = names[0].endswith(".weight")
            num_bits = self._num_elements[names[0]] * (8 if has_bytes else 32)
            yield plain_name(f"{module}.weight"), num_bits // (8 if has_bytes else scheme.bits), scheme
            parts.update(names)
        for name, num_elements in self._num_elements.items():
            if name not in parts:
                yield plain_name(name), num_elements, None

    def read(self, name: str) -> Tensor:
        """Return a tensor that is there, as it is stored; mapped, not copied."""
        self._unused.discard(name)
        with safe_open(self._files[name], framework="pt") as handle:
            tensor: Tensor = handle.get_tensor(name)
        return tensor

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return the tensor ``name`` in ``dtype``; mapped, not copied, where it has that dtype already.

        Raises ``ModelUnreadable`` if it is missing or not of ``shape``.
        """
        if len(shape) == 2 and name.endswith(".weight"):
            codes = self.take_codes(name.removesuffix(".weight"), (shape[0], shape[1]))
            if codes is not None:
                return dequantize(codes).to(dtype)
        stored = self._stored_names.get(name)
        if stored is None:
            raise ModelUnreadable(
                f"{self._path} has no tensor {name}: the checkpoint is incomplete, or of another "
                "architecture than its config.json says"
            )
        tensor = self.read(stored)
        self._check_shape(stored, tensor, shape)
        if not tensor.dtype.is_floating_point:
            raise ModelUnreadable(
                f"{self._files[stored]}: {stored} is {tensor.dtype}; weights must be bf16, fp16 or fp32, or have a "
                "quantization_config in config.json"
            )
        return tensor.to(dtype)

    def take_codes(self, module: str, shape: tuple[int, int]) -> QuantizedWeight | None:
        """Return the weight of ``module`` if it is kept in codes; see ``TensorSource``."""
        stored = self._stored_names.get(module)
        if self.quantized is None or stored is None or stored not in self.quantized:
            return None
        weight = self.quantized.weight(stored)
        self._check_shape(f"{stored}.weight", weight.codes, shape)
        return weight

    def _check_shape(self, name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
        if tuple(tensor.shape) != shape:
            raise ModelUnreadable(
                f"{self._files.get(name, self._path)}: {name} is {list(tensor.shape)}, and config.json makes it "
                f"{list(shape)}; the two do not belong together"
            )

    def unread(self, name: str, tensor: Tensor) -> Tensor:
        """Return ``tensor``, which was taken by this name, mapped anew: what was read of it is no longer in memory.

        One that was converted, or widened from codes, is returned as it is.
        """
        name = self._stored_names.get(name, "")
        stored = self.read(name) if name in self._files else tensor
        return stored if stored.dtype is tensor.dtype else tensor
