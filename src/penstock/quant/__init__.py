"""Quantized checkpoints: one form of codes inside, and the layouts that files have them in."""

from penstock.quant.codes import QuantizedWeight, Scheme, dequantize
from penstock.quant.layouts import LAYOUTS, Layout, layout_to_write, read_layout
from penstock.quant.prepare import Weight, bytes_of_weight, prepare_gated_linear, prepare_linear, select_rows
from penstock.quant.reader import QuantizedModules

__all__ = [
    "LAYOUTS",
    "Layout",
    "QuantizedModules",
    "QuantizedWeight",
    "Scheme",
    "Weight",
    "bytes_of_weight",
    "dequantize",
    "layout_to_write",
    "prepare_gated_linear",
    "prepare_linear",
    "read_layout",
    "select_rows",
]
