"""Reading a GGUF file: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian.

Our own reader, because the format is small and files come from strangers: every count and offset is checked against the
size of the file before anything is made of it. The package ``gguf`` trusts what it reads, and brings what converting
models takes.
"""

import math
import struct
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penstock.errors import ModelUnreadable
from penstock.gguf.dequantize import FORMATS, dequantize, split_codes

_MAGIC = 0x46554747
_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_MAX_DIMENSIONS = 4
_MAX_DEPTH = 2
"""Arrays of arrays are allowed by the format and used by nobody; deeper ones only by those who mean harm."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies and how it is written."""

    shape: tuple[int, ...]
    """Outermost dimension first, as torch has it"""
    format: int
    """ggml's number; a key of ``dequantize.FORMATS``"""
    offset: int
    num_bytes: int


class GGUFFile:
    """Metadata and tensors of one file, which stays mapped. Immutable."""

    def __init__(self, path: Path) -> None:
        """Read the header; raises ``ModelUnreadable`` if the file is not whole or not what it says it is."""
        self.path = path
        try:
            self._data: NDArray[np.uint8] = np.memmap(path, dtype=np.uint8, mode="r")
        except (OSError, ValueError) as error:
            raise ModelUnreadable(f"{path} cannot be read: {error}; fetch the file again") from error
        self._at = 0
        try:
            self.metadata, self.tensors = self._read()
        except (UnicodeDecodeError, OverflowError, MemoryError) as error:
            raise self._broken(f"holds what cannot be read ({error})") from error

    def tensor(self, name: str, part: int | None = None) -> NDArray[np.float32]:
        """Return the values of tensor ``name``, or of its part at ``part`` of the first dimension, as a new array."""
        data, shape = self._part(name, part)
        return dequantize(data, self.tensors[name].format).reshape(shape)

    def codes(self, name: str, part: int | None = None) -> tuple[NDArray[np.uint8], NDArray[np.float16]]:
        """Return the codes [N, K] and scales [N, K / block] of a matrix in a format that has them."""
        data, shape = self._part(name, part)
        codes, scales = split_codes(data, self.tensors[name].format)
        return codes.reshape(shape), scales.reshape(shape[0], -1)

    def _part(self, name: str, part: int | None) -> tuple[NDArray[np.uint8], tuple[int, ...]]:
        """Return a tensor's bytes and shape."""
        info = self.tensors[name]
        shape, offset, num_bytes = info.shape, info.offset, info.num_bytes
        if part is not None:
            num_bytes //= shape[0]
            shape, offset = shape[1:], offset + part * num_bytes
        return self._data[offset : offset + num_bytes], shape

    def _read(self) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
        if self._number("I") != _MAGIC:
            raise ModelUnreadable(f"{self.path} is not a GGUF file: it does not begin with GGUF")
        version = self._number("I")
        if version not in (2, 3):
            raise ModelUnreadable(f"{self.path} is of GGUF version {version}; Penstock reads 2 and 3, little-endian")
        num_tensors, num_values = self._count(24), self._count(13)
        metadata: dict[str, Any] = {}
        for _ in range(num_values):
            key = self._string()
            if key in metadata:
                raise self._broken(f"has {key!r} twice")
            metadata[key] = self._value(self._number("I"), _MAX_DEPTH)
        headers = [self._tensor_header() for _ in range(num_tensors)]
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise self._broken(f"has the alignment {alignment!r}, which is not a power of two")
        begin = -(-self._at // alignment) * alignment
        tensors: dict[str, TensorInfo] = {}
        for name, shape, number, offset in headers:
            if name in tensors:
                raise self._broken(f"has the tensor {name!r} twice")
            tensors[name] = self._locate(name, shape, number, begin + offset, alignment)
        return metadata, tensors

    def _tensor_header(self) -> tuple[str, tuple[int, ...], int, int]:
        name, num_dimensions = self._string(), self._number("I")
        if num_dimensions > _MAX_DIMENSIONS:
            raise self._broken(f"says that {name!r} has {num_dimensions} dimensions")
        dimensions = [self._number("Q") for _ in range(num_dimensions)]
        return name, tuple(reversed(dimensions)), self._number("I"), self._number("Q")

    def _locate(self, name: str, shape: tuple[int, ...], number: int, offset: int, alignment: int) -> TensorInfo:
        if number not in FORMATS:
            known = ", ".join(form.name for form in FORMATS.values())
            raise ModelUnreadable(
                f"{self.path}: {name} is of ggml's format {number}; Penstock reads {known}; fetch one of those"
            )
        form = FORMATS[number]
        num_elements, row = math.prod(shape), shape[-1] if shape else 1
        if row % form.block_elements:
            raise self._broken(f"says that {name!r} in {form.name} has rows of {row}")
        num_bytes = num_elements // form.block_elements * form.block_bytes
        if offset % alignment or offset + num_bytes > len(self._data):
            raise self._broken(f"says that {name!r} takes {num_bytes} bytes from {offset} on, of {len(self._data)}")
        return TensorInfo(shape, number, offset, num_bytes)

    def _value(self, kind: int, depth: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind in _SCALARS:
            return self._number(_SCALARS[kind])
        if kind != _ARRAY or depth == 0:
            raise self._broken(f"has a value of the unknown kind {kind}")
        inner = self._number("I")
        if inner in _SCALARS:
            code = _SCALARS[inner]
            count = self._count(struct.calcsize(code))
            values = np.frombuffer(self._take(count * struct.calcsize(code)), dtype=f"<{code}")
            return values.tolist()
        return [self._value(inner, depth - 1) for _ in range(self._count(8))]

    def _string(self) -> str:
        return self._take(self._count(1)).decode()

    def _count(self, element_bytes: int) -> int:
        """Return a count of things of at least ``element_bytes`` each, which have to fit in what is left."""
        count = int(self._number("Q"))
        if count * element_bytes > len(self._data) - self._at:
            raise self._broken(f"says that {count} values follow at byte {self._at}")
        return count

    def _number(self, code: str) -> Any:
        (value,) = struct.unpack(f"<{code}", self._take(struct.calcsize(code)))
        return value

    def _take(self, num_bytes: int) -> bytes:
        end = self._at + num_bytes
        if end > len(self._data):
            raise self._broken(f"ends at byte {len(self._data)}, before its header does")
        taken = self._data[self._at : end].tobytes()
        self._at = end
        return taken

    def _broken(self, what: str) -> ModelUnreadable:
        return ModelUnreadable(f"{self.path} is broken or cut short: it {what}; fetch the file again")


def read_gguf(path: Path) -> GGUFFile:
    """Return the file at ``path``, read once as long as it does not change. Raises ``ModelUnreadable``."""
    try:
        status = path.stat()
    except OSError as error:
        raise ModelUnreadable(f"{path} cannot be read: {error}") from error
    return _read_once(path, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=2)
def _read_once(path: Path, _modified: int, _size: int) -> GGUFFile:
    return GGUFFile(path)
