"""What this machine can do at most with the threads kernels run on: the floor that an op's time is held against."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from penstock.kernels.native import NATIVE

_READ_BYTES = 256 << 20
"""More than any cache holds."""


Numbers = Literal["float32", "bfloat16", "bytes"]
"""What is multiplied; the processor has instructions of its own for each."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Measured, not looked up: shared machines give what they have to spare."""

    read_bytes_per_s: float
    """Reading memory from front to back, in huge pages where kernels use them"""
    flops_per_s: float
    """Float32 multiply-adds in registers, each counted as two"""
    bfloat16_ops_per_s: float
    """The same of bfloat16s, in the fewest instructions there are for sums of their products"""
    byte_ops_per_s: float
    """The same of bytes"""

    def floor_s(self, num_bytes: float, num_ops: float, *, of: Numbers = "float32") -> float:
        """Return the seconds that moving or computing takes at least, whichever is longer."""
        rates = {"float32": self.flops_per_s, "bfloat16": self.bfloat16_ops_per_s, "bytes": self.byte_ops_per_s}
        return max(num_bytes / self.read_bytes_per_s, num_ops / rates[of])


def measure_limits() -> Limits:
    """Return this machine's limits; takes about a second, with all of the kernels' threads busy."""
    if NATIVE is not None:
        rates = (NATIVE.multiply_add_rate(numbers) for numbers in ("float32", "bfloat16", "bytes"))
        return Limits(NATIVE.read_bandwidth(_READ_BYTES), *rates)
    numbers, square = torch.ones(_READ_BYTES // 4), torch.ones(1024, 1024)
    reading_s = min(_seconds(lambda: numbers.sum()) for _ in range(5))
    computing_s = min(_seconds(lambda: square @ square) for _ in range(5))
    # The reference multiplies floats alone.
    rate = 2 * 1024**3 / computing_s
    return Limits(_READ_BYTES / reading_s, rate, rate, rate)


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
