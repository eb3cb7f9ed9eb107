"""Tensors of a checkpoint, memory-mapped: nothing is read until it is used."""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from safetensors import SafetensorError, safe_open

from penstock.errors import ModelUnreadable
from penstock.gguf import is_gguf
from penstock.json_objects import read_json_object
from penstock.kernels.dtypes import torch_dtype
from penstock.kernels.tensor import Tensor
from penstock.models.ahead import Ahead
from penstock.models.files import check_shape, missing, plain_name, weight_files
from penstock.models.gguf_weights import GGUFWeights
from penstock.quant import QuantizedModules, QuantizedWeight, Scheme, dequantize, read_layout


class TensorSource(Protocol):
    """Where a model gets its tensors."""

    def take(self, name: str, shape: tuple[int, ...], dtype: str) -> Tensor:
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


def open_weights(path: Path, ahead: Ahead | None = None) -> AbstractContextManager[StoredTensors]:
    """Return the tensors of the model in directory or GGUF file ``path``: arrays if they are ``ahead``, or torch's."""
    if ahead is not None and ahead.weights is not None:
        return nullcontext(ahead.weights)
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

    def take(self, name: str, shape: tuple[int, ...], dtype: str) -> Tensor:
        """Return the tensor ``name`` in ``dtype``; mapped, not copied, where it has that dtype already.

        Raises ``ModelUnreadable`` if it is missing or not of ``shape``.
        """
        if len(shape) == 2 and name.endswith(".weight"):
            codes = self.take_codes(name.removesuffix(".weight"), (shape[0], shape[1]))
            if codes is not None:
                return dequantize(codes).to(torch_dtype(dtype))
        stored = self._stored_names.get(name)
        if stored is None:
            raise missing(self._path, name)
        tensor = self.read(stored)
        check_shape(self._files[stored], stored, tensor.shape, shape)
        if not tensor.dtype.is_floating_point:
            raise ModelUnreadable(
                f"{self._files[stored]}: {stored} is {tensor.dtype}; weights must be bf16, fp16 or fp32, or have a "
                "quantization_config in config.json"
            )
        return tensor.to(torch_dtype(dtype))

    def take_codes(self, module: str, shape: tuple[int, int]) -> QuantizedWeight | None:
        """Return the weight of ``module`` if it is kept in codes; see ``TensorSource``."""
        stored = self._stored_names.get(module)
        if self.quantized is None or stored is None or stored not in self.quantized:
            return None
        weight = self.quantized.weight(stored)
        name = f"{stored}.weight"
        check_shape(self._files.get(name, self._path), name, weight.codes.shape, shape)
        return weight
