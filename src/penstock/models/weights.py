"""Tensors of a checkpoint, memory-mapped: nothing is read until it is used."""

import json
import math
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
from penstock.models.gguf_weights import GGUFWeights

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


class TensorSource(Protocol):
    """Where a model gets its tensors."""

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return the tensor that a checkpoint would call ``name``, of ``shape``, in ``dtype``.

        Raises ``ModelUnreadable`` if there is none.
        """


class StoredTensors(TensorSource, Protocol):
    """Tensors of a file, which knows what it holds."""

    def unused(self) -> Iterator[str]:
        """Names that nobody took."""

    def num_elements(self, name: str) -> int:
        """Return the size of a tensor without reading it."""


def open_weights(path: Path) -> AbstractContextManager[StoredTensors]:
    """Return the tensors of the model in directory or GGUF file ``path``."""
    return GGUFWeights(path) if is_gguf(path) else Weights(path)


class Weights:
    """All tensors of a checkpoint by name. A context manager; tensors taken from it stay valid after.

    Every tensor has a mapping of its own, so that what was read and packed stops being this process's memory at once.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._files: dict[str, Path] = {}
        self._num_elements: dict[str, int] = {}
        self._unused: set[str] = set()

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
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing is held open."""

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def unused(self) -> Iterator[str]:
        """Names that nobody took."""
        return iter(sorted(self._unused))

    def num_elements(self, name: str) -> int:
        """Return the size of a tensor without reading it."""
        return self._num_elements[name]

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return the tensor ``name`` in ``dtype``; mapped, not copied, where it has that dtype already.

        Raises ``ModelUnreadable`` if it is missing or not of ``shape``.
        """
        if name not in self._files:
            raise ModelUnreadable(
                f"{self._path} has no tensor {name}: the checkpoint is incomplete, or of another "
                "architecture than its config.json says"
            )
        file = self._files[name]
        with safe_open(file, framework="pt") as handle:
            tensor: Tensor = handle.get_tensor(name)
        if tuple(tensor.shape) != shape:
            raise ModelUnreadable(
                f"{file}: {name} is {list(tensor.shape)}, and config.json makes it {list(shape)}; the two do not "
                "belong together"
            )
        if not tensor.dtype.is_floating_point:
            raise ModelUnreadable(f"{file}: {name} is {tensor.dtype}; weights must be bf16, fp16 or fp32")
        self._unused.discard(name)
        return tensor.to(dtype)
