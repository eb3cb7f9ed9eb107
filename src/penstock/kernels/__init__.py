"""The operations models are made of: one folder per op, the plain torch reference beside any faster one.

What is exported here is imported when it is asked for: compiled kernels pack weights while others are still imported.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from penstock.kernels.cpu import CPUOps, ops_for
    from penstock.kernels.layout import BatchLayout, KVBlocks
    from penstock.kernels.linear.quantization import QUANTIZATIONS, InputCodes, Quantization, Stacked, WeightCodes
    from penstock.kernels.native import describe, use_threads
    from penstock.kernels.ops import Attention, Embedding, HeadNorms, Linear, Ops, Replay
    from penstock.kernels.reference import ReferenceOps

_MODULES = {
    "cpu": ("CPUOps", "ops_for"),
    "layout": ("BatchLayout", "KVBlocks"),
    "linear.quantization": ("QUANTIZATIONS", "InputCodes", "Quantization", "Stacked", "WeightCodes"),
    "native": ("describe", "use_threads"),
    "ops": ("Attention", "Embedding", "HeadNorms", "Linear", "Ops", "Replay"),
    "reference": ("ReferenceOps",),
}

__all__ = [
    "QUANTIZATIONS",
    "Attention",
    "BatchLayout",
    "CPUOps",
    "Embedding",
    "HeadNorms",
    "InputCodes",
    "KVBlocks",
    "Linear",
    "Ops",
    "Quantization",
    "ReferenceOps",
    "Replay",
    "Stacked",
    "WeightCodes",
    "describe",
    "ops_for",
    "use_threads",
]


def __getattr__(name: str) -> object:
    for module, names in _MODULES.items():
        if name in names:
            value: object = getattr(import_module(f"{__name__}.{module}"), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
