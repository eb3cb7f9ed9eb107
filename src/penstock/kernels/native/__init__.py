"""The compiled kernels, where they were built, and which instruction set they use.

``PENSTOCK_KERNELS`` chooses: one of ``INSTRUCTION_SETS``, or ``reference`` for plain torch ops. Unset, the best that
this processor runs. torch is not imported here, for packing begins before it is.
"""

import os
from collections.abc import Sequence
from functools import partial
from types import ModuleType
from typing import TYPE_CHECKING

from penstock.errors import InvalidSetting, KernelUnsupported
from penstock.kernels.dtypes import dtype_name
from penstock.lean_torch import when_imported

if TYPE_CHECKING:
    from torch import Tensor

VARIABLE = "PENSTOCK_KERNELS"
INSTRUCTION_SETS = ("amx", "avx512_bf16", "avx512_vnni", "avx512", "avx2_vnni", "avx2", "portable")
IN_PAIRS = ("amx", "avx512_bf16")
"""Those that multiply bfloat16s two at a time: activations that meet bfloat16 weights are rounded for them."""


def _load() -> ModuleType | None:
    wanted = os.environ.get(VARIABLE, "")
    if wanted not in ("", "reference", *INSTRUCTION_SETS):
        raise InvalidSetting(
            f"{VARIABLE} is {wanted!r}; it can be {', '.join(INSTRUCTION_SETS)} or reference, or be left out",
            param=VARIABLE,
        )
    if wanted == "reference":
        return None
    try:
        from penstock.kernels.native import _native
    except ImportError as error:
        if wanted:
            raise InvalidSetting(
                f"{VARIABLE} asks for {wanted}, and the native kernels were not built ({error}); install a C++ "
                f"compiler and penstock again, or leave {VARIABLE} out",
                param=VARIABLE,
            ) from error
        return None
    if wanted:
        try:
            _native.choose(wanted)
        except ValueError as error:
            raise InvalidSetting(f"{VARIABLE}: {error}", param=VARIABLE) from error
    return _native


NATIVE = _load()
"""The compiled module; None where it was not built or is not wanted."""


MAX_REPLAYED_TOKENS = 512
"""Larger steps are not repeated from a recording: they compute for so long that what Python takes does not count, and
memory no step has used takes no room."""


def describe() -> str:
    """Return which kernels run, in a word: an instruction set, or reference."""
    return "reference" if NATIVE is None else str(NATIVE.isa())


def use_threads(
    num_threads: int, *, many_rows_threads: int | None = None, cpus: Sequence[int] = (), torch_works: bool = False
) -> None:
    """Let kernels run on ``num_threads``, the caller's included; over many rows on ``many_rows_threads``, if given.

    Those besides the caller's are each tied to one of the processors ``cpus``, as far as these go.

    torch's own pool gets as many only where it does the work: all of it without compiled kernels, a part of it where
    ``torch_works``. Otherwise it gets one, for two pools that wait for work by spinning fight over the cores.

    Raises ``InvalidSetting`` where the system refuses to start as many; kernels then run on those they had.
    """
    when_imported(partial(_use_torch_threads, num_threads if NATIVE is None or torch_works else 1))
    if NATIVE is None:
        return
    num_pooled = max(num_threads, many_rows_threads or 0)
    try:
        NATIVE.set_num_threads(num_pooled, num_threads, cpus)
    except RuntimeError as error:
        raise InvalidSetting(
            f"the system refuses to start {num_pooled} threads ({error}); lower runner.threads (--threads), or raise "
            "what limits them: ulimit -u, a container's pids limit, or memory for their stacks",
            param="runner.threads",
        ) from error


def _use_torch_threads(num_threads: int) -> None:
    import torch

    torch.set_num_threads(num_threads)


def checked(x: "Tensor", dtype: str, *shape: int) -> int:
    """Return the address of ``x``, which must be dense, of ``dtype`` and of ``shape``; -1 stands for any size.

    Raises ``KernelUnsupported`` otherwise: compiled code trusts what it is given.
    """
    # Some hundred times a step: one comparison where every size is known.
    if dtype_name(x.dtype) == dtype and x.is_contiguous() and (x.shape == shape or _fits(x.shape, shape)):
        return x.data_ptr()
    raise _unfit(x, dtype, shape)


def checked_rows(x: "Tensor", num_rows: int, width: int) -> tuple[int, int]:
    """Return the address of ``x`` [num_rows, width] float32, whose rows are dense, and how far these are apart.

    Raises ``KernelUnsupported`` for any other, and where rows lie on each other.
    """
    if dtype_name(x.dtype) == "float32" and x.shape == (num_rows, width):
        apart, step = x.stride()
        if (step == 1 or width == 1) and (apart >= width or num_rows == 1):
            return x.data_ptr(), apart
    raise _unfit(x, "float32", (num_rows, width))


def _fits(sizes: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    return len(sizes) == len(wanted) and all(b in (a, -1) for a, b in zip(sizes, wanted, strict=True))


def _unfit(x: "Tensor", dtype: str, shape: tuple[int, ...]) -> KernelUnsupported:
    sizes = ["any" if size == -1 else str(size) for size in shape]
    dense = "dense" if x.is_contiguous() else f"with strides {list(x.stride())}"
    return KernelUnsupported(
        f"a native kernel takes a dense {dtype} tensor of [{', '.join(sizes)}], not a {dense} {dtype_name(x.dtype)} of "
        f"{list(x.shape)}"
    )
