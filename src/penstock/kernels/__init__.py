"""The operations models are made of: one folder per op, the plain torch reference beside any faster one."""

from penstock.kernels.cpu import CPUOps, ops_for
from penstock.kernels.layout import BatchLayout, KVBlocks
from penstock.kernels.ops import Attention, Linear, Ops
from penstock.kernels.reference import ReferenceOps

__all__ = ["Attention", "BatchLayout", "CPUOps", "KVBlocks", "Linear", "Ops", "ReferenceOps", "ops_for"]
