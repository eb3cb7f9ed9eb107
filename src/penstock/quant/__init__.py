"""Quantized checkpoints: one form of codes inside, and the layouts that files have them in."""

from penstock.quant.codes import QuantizedWeight, Scheme, dequantize

__all__ = ["QuantizedWeight", "Scheme", "dequantize"]
