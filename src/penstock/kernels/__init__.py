"""The operations models are made of: one folder per op, the plain torch reference beside any faster one."""

from penstock.kernels.layout import BatchLayout, KVBlocks
from penstock.kernels.ops import Linear, Ops, ReferenceOps

__all__ = ["BatchLayout", "KVBlocks", "Linear", "Ops", "ReferenceOps"]
