"""What a tensor is to compiled kernels, for who runs without torch: memory, and how it is to be read."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn, cast

import numpy as np
import numpy.typing as npt

from penstock.kernels.dtypes import torch_dtype

if TYPE_CHECKING:
    from torch import Tensor


class NotNative(TypeError):
    """Something was to be done that only torch does."""


class Array:
    """A tensor's memory. It goes by torch's names, so that a forward pass made of compiled kernels is written once.

    Apart from kernels nothing computes with one: it can be looked at in parts or in another shape. ``numpy`` gives what
    does. Whatever else it is asked for raises ``NotNative``.
    """

    __array_ufunc__ = None
    """Not for numpy to compute with either, unless it is asked by ``numpy``"""
    __slots__ = ("_memory", "_owner", "dtype")

    def __init__(self, memory: npt.NDArray[Any], dtype: str | None = None, *, owner: object = None) -> None:
        """``memory`` has bfloat16 as uint16, for want of better; ``dtype`` says so. ``owner`` lives as long."""
        self._memory = memory
        self._owner = owner
        self.dtype = dtype or memory.dtype.name
        """Its name"""

    @property
    def shape(self) -> tuple[int, ...]:
        """The size of each dimension."""
        return self._memory.shape

    @property
    def ndim(self) -> int:
        """How many dimensions there are."""
        return self._memory.ndim

    @property
    def nbytes(self) -> int:
        """What all elements take."""
        return self._memory.nbytes

    def __len__(self) -> int:
        return len(self._memory)

    def data_ptr(self) -> int:
        """Return the address of the first element."""
        address: int = self._memory.__array_interface__["data"][0]
        return address

    def stride(self, dim: int | None = None) -> Any:
        """Return how many elements neighbours in a dimension are apart, or those of all."""
        strides = tuple(step // self._memory.itemsize for step in self._memory.strides)
        return strides if dim is None else strides[dim]

    def is_contiguous(self) -> bool:
        """Return whether elements follow each other without gaps."""
        return bool(self._memory.flags.c_contiguous)

    def element_size(self) -> int:
        """Return the bytes of one."""
        return self._memory.itemsize

    def numel(self) -> int:
        """Return how many elements there are."""
        return self._memory.size

    def __getitem__(self, key: int | slice | tuple[int | slice, ...]) -> "Array":
        for part in key if isinstance(key, tuple) else (key,):
            if not isinstance(part, int | slice):
                raise NotNative(f"an array is not indexed by {type(part).__name__}: that would copy")
        return Array(self._memory[key], self.dtype, owner=self._owner)

    def view(self, *shape: int) -> "Array":
        """Return the same elements in another shape."""
        if not self.is_contiguous():
            raise NotNative(f"an array of {list(self.shape)} with strides {list(self.stride())} has no other shape")
        return Array(self._memory.reshape(shape), self.dtype, owner=self._owner)

    def flatten(self, first: int) -> "Array":
        """Return the same elements with dimensions from ``first`` on as one."""
        return self.view(*self.shape[:first], -1)

    def unsqueeze(self, dim: int) -> "Array":
        """Return the same elements with one more dimension before ``dim``."""
        return Array(np.expand_dims(self._memory, dim), self.dtype, owner=self._owner)

    def float(self) -> "Array":
        """Return this if it is float32, or a copy that is."""
        if self.dtype == "float32":
            return self
        if self.dtype != "bfloat16":
            raise NotNative(f"an array of {self.dtype} is not made one of float32")
        return Array((self._memory.astype(np.uint32) << 16).view(np.float32))

    def numpy(self) -> npt.NDArray[Any]:
        """Return the elements, those of bfloat16 as uint16; nothing is copied."""
        return self._memory

    def torch(self) -> "Tensor":
        """Return the elements as torch's; nothing is copied."""
        import torch

        bits = self._memory.view(np.int16) if self.dtype == "bfloat16" else self._memory
        return torch.from_numpy(bits).view(torch_dtype(self.dtype))

    def as_tensor(self) -> "Tensor":
        """Return this, a tensor to type checkers, for what is written for both."""
        return cast("Tensor", self)

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)
        raise NotNative(f"no compiled kernel does what {name!r} does")


def zeros(*shape: int, dtype: str = "float32") -> Array:
    """Return zeros of one of numpy's dtypes, whose memory is taken as it is written to."""
    return Array(np.zeros(shape, dtype=dtype))


def as_torch(tensor: "Tensor") -> "Tensor":
    """Return ``tensor`` for torch to compute with, whether it is one of torch's or an array; nothing is copied."""
    return tensor.torch() if isinstance(tensor, Array) else tensor


def plus(tensor: "Tensor", number: float) -> "Tensor":
    """Return ``tensor`` of float32 and ``number`` added to each element."""
    return Array(tensor.numpy() + np.float32(number)).as_tensor() if isinstance(tensor, Array) else tensor + number


def joined(tensors: "Sequence[Tensor]") -> "Tensor":
    """Return ``tensors`` one behind the other; arrays become float32."""
    arrays = [tensor for tensor in tensors if isinstance(tensor, Array)]
    if len(arrays) == len(tensors):
        return Array(np.concatenate([array.float().numpy() for array in arrays])).as_tensor()
    import torch

    return torch.cat(list(tensors))
