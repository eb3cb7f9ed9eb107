"""Compressing one layer whose inputs were watched: scales that move between weights, then codes or zeros.

N outputs, K inputs.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from penstock.compress.calibration.statistics import InputStatistics
from penstock.compress.checkpoint import Checkpoint
from penstock.compress.folding import fold, producer_of
from penstock.compress.methods.awq import awq, product_error, search_scales
from penstock.compress.methods.gptq import gptq
from penstock.compress.methods.low_rank import low_rank
from penstock.compress.methods.rtn import rtn
from penstock.compress.methods.smoothquant import smoothing_scales
from penstock.compress.methods.sparsegpt import sparsegpt
from penstock.compress.methods.sparsity import magnitude
from penstock.compress.methods.wanda import wanda
from penstock.compress.recipe import Treatment
from penstock.compress.units import Unit
from penstock.kernels import InputCodes
from penstock.quant import QuantizedWeight, dequantize


@dataclass(frozen=True, slots=True)
class UnitReport:
    """What compressing a unit did to its products with calibration inputs."""

    unit: str
    method: str
    bits: int | None
    """Of a code; None where weights stay floats"""
    error: float | None
    """Norm of the change over the norm of the products; None where inputs were not watched"""


@dataclass(slots=True)
class CompressedLayer:
    """What becomes of a layer's tensors; all others stay as they are."""

    codes: dict[str, QuantizedWeight] = field(default_factory=dict)
    """By module, whatever becomes of activations"""
    inputs: dict[str, InputCodes] = field(default_factory=dict)
    """What static activations are rounded to, likewise"""
    changed: dict[str, Tensor] = field(default_factory=dict)
    """Other tensors by name, in the dtype they are stored in"""
    reports: list[UnitReport] = field(default_factory=list)

    def replaced(self) -> dict[str, Tensor]:
        """Return the tensors to run the layer with in the checkpoint's place."""
        return self.changed | {f"{module}.weight": dequantize(weight) for module, weight in self.codes.items()}


def compress_layer(
    checkpoint: Checkpoint, treatments: Mapping[Unit, Treatment], statistics: Mapping[Unit, InputStatistics]
) -> CompressedLayer:
    """Compress the units of one layer, in the order of ``treatments``. Raises ``CalibrationUnfit``."""
    config = checkpoint.config
    tensors = _Tensors(checkpoint)
    scales = {}
    for unit, treatment in treatments.items():
        producer = producer_of(unit, config)
        if treatment.method == "keep" or producer is None:
            continue
        weight, seen = tensors.unit(unit), statistics.get(unit)
        if treatment.method == "awq":
            assert seen is not None
            found = search_scales(
                weight,
                seen.hessian,
                seen.magnitudes,
                treatment.scheme,
                shared_by=producer.shared_by,
                width=producer.width,
            )
        elif treatment.smooth is not None and producer.is_norm:
            assert seen is not None
            found = smoothing_scales(weight, seen.greatest, strength=treatment.smooth)
        else:
            continue
        dtype = checkpoint.read(producer.tensors[0]).dtype
        scales[unit] = fold(producer, found, tensors, dtype=dtype, norm_offset=config.norms.offset)
        for module in unit.modules:
            tensors[f"{module}.weight"] = tensors[f"{module}.weight"] * scales[unit]
    result = CompressedLayer()
    for unit, treatment in treatments.items():
        if treatment.makes_zeros:
            _sparsify_unit(unit, treatment, tensors, statistics.get(unit), result)
        elif treatment.size is not None:
            _factorize_unit(unit, treatment, tensors, statistics[unit], checkpoint, result)
        elif treatment.makes_codes:
            _compress_unit(unit, treatment, tensors, statistics.get(unit), scales.get(unit), result)
    for name, tensor in tensors.changed.items():
        if name.removesuffix(".weight") not in result.codes and name not in result.changed:
            result.changed[name] = tensor.to(checkpoint.read(name).dtype)
    return result


def _compress_unit(
    unit: Unit,
    treatment: Treatment,
    tensors: "_Tensors",
    seen: InputStatistics | None,
    scales: Tensor | None,
    result: CompressedLayer,
) -> None:
    weight = tensors.unit(unit)
    scheme = replace(treatment.scheme, activations=None, activation_zeros=False)
    hessian = None if seen is None else seen.hessian
    if hessian is not None and scales is not None:
        hessian = hessian / scales.outer(scales)
    if treatment.method == "rtn" or hessian is None:
        codes = rtn(weight, scheme)
    elif treatment.method == "gptq":
        codes = gptq(weight, hessian, scheme, act_order=treatment.act_order, damping=treatment.damping)
    else:
        codes = awq(weight, hessian, scheme)
    error = None if hessian is None else relative_error(dequantize(codes), weight, hessian)
    result.reports.append(UnitReport(unit.label, treatment.method, treatment.bits, error))
    start = 0
    for module, (num_outputs, _) in zip(unit.modules, unit.shapes, strict=True):
        result.codes[module] = codes.rows(slice(start, start + num_outputs))
        start += num_outputs


def _sparsify_unit(
    unit: Unit, treatment: Treatment, tensors: "_Tensors", seen: InputStatistics | None, result: CompressedLayer
) -> None:
    """Put zeros into each of the unit's matrices by itself: their outputs differ in scale, so shares do not compare."""
    before = tensors.unit(unit)
    for module in unit.modules:
        name = f"{module}.weight"
        if treatment.method == "magnitude" or seen is None:
            tensors[name] = magnitude(tensors[name], treatment.zeros)
        elif treatment.method == "wanda":
            tensors[name] = wanda(tensors[name], seen.hessian, treatment.zeros)
        else:
            tensors[name] = sparsegpt(tensors[name], seen.hessian, treatment.zeros, damping=treatment.damping)
    error = None if seen is None else relative_error(tensors.unit(unit), before, seen.hessian)
    result.reports.append(UnitReport(unit.label, treatment.method, None, error))


def _factorize_unit(
    unit: Unit,
    treatment: Treatment,
    tensors: "_Tensors",
    seen: InputStatistics,
    checkpoint: Checkpoint,
    result: CompressedLayer,
) -> None:
    """Make two matrices of all of a unit's, which read the same input: the first one is theirs together."""
    weight = tensors.unit(unit)
    dtype = checkpoint.read(f"{unit.modules[0]}.weight").dtype
    factors = low_rank(weight, seen.hessian, treatment.rank(unit), damping=treatment.damping)
    first, second = (factor.to(dtype) for factor in factors)
    error = relative_error(second.float() @ first.float(), weight, seen.hessian)
    result.reports.append(UnitReport(unit.label, treatment.method, None, error))
    result.changed[f"{unit.modules[0]}.low_rank.weight"] = first
    sizes = [num_outputs for num_outputs, _ in unit.shapes]
    for module, rows in zip(unit.modules, torch.split(second, sizes), strict=True):
        result.changed[f"{module}.weight"] = rows.contiguous()


def relative_error(changed: Tensor, weight: Tensor, hessian: Tensor) -> float:
    """Return the norm of the products' change over the norm of the products."""
    size = product_error(weight, hessian)
    return (max(product_error(changed - weight, hessian), 0.0) / size) ** 0.5 if size else 0.0


class _Tensors(dict[str, Tensor]):
    """A layer's tensors in float32, read when they are first asked for; keeps which were set."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__()
        self._checkpoint = checkpoint
        self._names: set[str] = set()

    @property
    def changed(self) -> dict[str, Tensor]:
        """Those that were set."""
        return {name: self[name] for name in sorted(self._names)}

    def __missing__(self, name: str) -> Tensor:
        tensor = self._checkpoint.read(name).to(torch.float32)
        super().__setitem__(name, tensor)
        return tensor

    def __setitem__(self, name: str, tensor: Tensor) -> None:
        self._names.add(name)
        super().__setitem__(name, tensor)

    def unit(self, unit: Unit) -> Tensor:
        """Return a unit's matrices [N, K], one below the other."""
        return torch.cat([self[f"{module}.weight"] for module in unit.modules])
