"""The operations models are made of: one folder per op, the plain torch reference beside any faster one."""

from penstock.kernels.cpu import CPUOps, ops_for
from penstock.kernels.layout import BatchLayout, KVBlocks
from penstock.kernels.linear.quantization import QUANTIZATIONS, InputCodes, Quantization, WeightCodes
from penstock.kernels.native import describe, use_threads
from penstock.kernels.ops import Attention, HeadNorms, Linear, Ops, Replay
from penstock.kernels.reference import ReferenceOps

__all__ = [
    "QUANTIZATIONS",
    "Attention",
    "BatchLayout",
    "CPUOps",
    "HeadNorms",
    "InputCodes",
    "KVBlocks",
    "Linear",
    "Ops",
    "Quantization",
    "ReferenceOps",
    "Replay",
    "WeightCodes",
    "describe",
    "ops_for",
    "use_threads",
]
