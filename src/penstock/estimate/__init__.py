"""Pure arithmetic on what a model will need: no tensors, no clocks, no sockets."""

from penstock.estimate.memory import (
    LEAST_SAMPLED_ROWS,
    ModelShape,
    activation_peak_bytes,
    format_memory_plan,
    plan_memory,
)
from penstock.estimate.system import available_memory_bytes, usable_cores

__all__ = [
    "LEAST_SAMPLED_ROWS",
    "ModelShape",
    "activation_peak_bytes",
    "available_memory_bytes",
    "format_memory_plan",
    "plan_memory",
    "usable_cores",
]
