"""Tensors of a checkpoint that is floats alone, as arrays in its mapped files. No torch: it may never be needed."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from penstock.errors import ModelUnreadable
from penstock.kernels.native.array import Array
from penstock.kernels.tensor import Tensor
from penstock.models.files import MappedFile, StoredTensor, check_shape, missing, plain_name

_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}


class ArrayWeights:
    """See ``weights.StoredTensors``. What is taken lies in the file where it has the dtype that is asked for."""

    def __init__(self, path: Path, files: Mapping[Path, MappedFile]) -> None:
        """``files`` are all that the model in directory ``path`` has."""
        self._path = path
        self._files = files
        self._stored: dict[str, tuple[Path, str, StoredTensor]] = {
            plain_name(name): (file, name, tensor)
            for file, mapped in files.items()
            for name, tensor in mapped.tensors.items()
        }
        self._unused = {name for mapped in files.values() for name in mapped.tensors}

    def unused(self) -> Iterator[str]:
        """Names that nobody took."""
        return iter(sorted(self._unused))

    def sizes(self) -> Iterator[tuple[str, int, None]]:
        """Yield all tensors; see ``weights.StoredTensors``."""
        for mapped in self._files.values():
            for name, tensor in mapped.tensors.items():
                yield plain_name(name), tensor.num_elements, None

    def take_codes(self, module: str, shape: tuple[int, int]) -> None:
        """Return None: nothing is in codes."""

    def take(self, name: str, shape: tuple[int, ...], dtype: str) -> Tensor:
        """Return the tensor ``name``; see ``weights.TensorSource``."""
        if name not in self._stored:
            raise missing(self._path, name)
        file, own_name, stored = self._stored[name]
        check_shape(file, own_name, stored.shape, shape)
        if stored.dtype not in _DTYPES:
            raise ModelUnreadable(
                f"{file}: {own_name} is {stored.dtype}; weights must be bf16, fp16 or fp32, or have a "
                "quantization_config in config.json"
            )
        self._unused.discard(own_name)
        return _converted(_lying_in(self._files[file], stored), dtype).as_tensor()


def _lying_in(file: MappedFile, stored: StoredTensor) -> Array:
    dtype = _DTYPES[stored.dtype]
    elements: npt.NDArray[np.generic] = np.frombuffer(
        file.buffer,
        dtype=np.uint16 if dtype == "bfloat16" else dtype,
        count=stored.num_elements,
        offset=stored.begin,
    )
    return Array(elements.reshape(stored.shape), dtype)


def _converted(array: Array, dtype: str) -> Array:
    if array.dtype == dtype:
        return array
    floats = array.numpy().astype(np.float32) if array.dtype in ("float16", "float64") else array.float().numpy()
    if dtype != "bfloat16":
        return Array(floats.astype(dtype))
    # The upper half of the bits, the lower one rounded to even; what is no number stays so.
    bits = floats.view(np.uint32)
    upper = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return Array(np.where(np.isnan(floats), 0x7FC0, upper).astype(np.uint16), "bfloat16")
