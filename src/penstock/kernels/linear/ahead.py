"""Packing before anybody asks for it: on threads of its own, while the engine's modules are imported. No torch."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

from penstock.kernels.linear.quantization import Quantization
from penstock.kernels.native import NATIVE

if TYPE_CHECKING:
    from penstock.kernels.native._native import PackedMatrix

FLOAT_KINDS = {"float32": 0, "bfloat16": 1}
CODE_KINDS = {8: 2, 4: 3}
"""``Weight`` of ``native/kernels.h``, by dtypes' names and by codes' bits"""


class MatrixSource(NamedTuple):
    """What makes a packed matrix, as ``_native.PackedMatrix`` takes it; addresses are 0 where there is nothing."""

    num_outputs: int
    num_inputs: int
    kind: int
    group: int
    int8_activations: bool
    source_kind: int
    parts: tuple[tuple[int, int], ...]
    """Addresses and rows"""
    up: int = 0
    scales: int = 0
    up_scales: int = 0
    zeros: int = 0
    up_zeros: int = 0
    input_scale: float = 0.0
    input_zero: float = 0.0

    @classmethod
    def of_floats(
        cls,
        parts: Iterable[tuple[int, int]],
        num_inputs: int,
        source_kind: int,
        form: Quantization | None,
        *,
        up: int = 0,
    ) -> "MatrixSource":
        """Return the source of floats that are kept in ``form``; None: as they come."""
        parts = tuple(parts)
        return cls(
            num_outputs=sum(num_rows for _, num_rows in parts),
            num_inputs=num_inputs,
            kind=source_kind if form is None else CODE_KINDS[form.bits],
            group=0 if form is None else form.group,
            int8_activations=form is not None and form.int8_activations,
            source_kind=source_kind,
            parts=parts,
            up=up,
        )


class PackedAhead:
    """Matrices that are being packed from files that are mapped.

    They are taken by what they are made of, addresses included: a guess that was wrong is never asked for.
    """

    def __init__(self, sources: Iterable[MatrixSource], num_threads: int) -> None:
        """Begin with ``sources``, in their order. What is mapped must stay so until ``close``."""
        assert NATIVE is not None
        self._matrices: dict[MatrixSource, PackedMatrix] = {
            source: NATIVE.PackedMatrix(*source, True) for source in sources
        }
        self._threads = NATIVE.PackingThreads(list(self._matrices.values()), num_threads)

    def __len__(self) -> int:
        """Return how many have not been taken."""
        return len(self._matrices)

    def take(self, source: MatrixSource) -> "PackedMatrix | None":
        """Return the matrix made of ``source``, packed or not; None if nobody began with it."""
        return self._matrices.pop(source, None)

    def close(self) -> None:
        """Have the threads end, and forget what nobody took."""
        self._threads.stop()
        self._matrices.clear()
