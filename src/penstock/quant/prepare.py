"""From what checkpoints hold to what kernels run: products with weights that are codes, floats or some of each.

Projections of the same inputs are computed side by side, so all parts of one product get one form. N outputs, K inputs,
G groups.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from penstock.kernels import InputCodes, Linear, Ops, Quantization, Stacked, WeightCodes
from penstock.kernels.dtypes import dtype_name, torch_dtype
from penstock.kernels.native.array import as_torch
from penstock.kernels.tensor import Tensor
from penstock.quant.codes import QuantizedWeight, Scheme, dequantize
from penstock.telemetry import get_logger

_log = get_logger(__name__)

Weight = Tensor | QuantizedWeight


def select_rows(weight: Weight, which: Tensor | slice) -> Weight:
    """Return the outputs ``which``, in their order."""
    if isinstance(weight, QuantizedWeight):
        return weight.rows(which)
    return weight[which] if isinstance(which, slice) else as_torch(weight)[which]


def prepare_linear(
    ops: Ops, parts: Sequence[Weight], bias: Tensor | None, dtype: str, *, activation: str | None = None
) -> Linear:
    """Return the product with ``parts`` [N, K] one below the other, ``bias`` [sum of N] and ``activation``.

    What ``ops`` do not keep in codes is widened to ``dtype``.
    """
    weights, order = _in_one_form(ops, parts, dtype)
    return _reordered(ops.prepare_linear(_stack(weights), bias, activation=activation), order)


def prepare_gated_linear(
    ops: Ops,
    gate: Weight,
    up: Weight,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    dtype: str,
    *,
    activation: str,
) -> Linear:
    """Return the product of two projections of which one gates the other; see ``Ops.prepare_gated_linear``."""
    (gates, ups), order = _in_one_form(ops, (gate, up), dtype)
    return _reordered(ops.prepare_gated_linear(gates, ups, gate_bias, up_bias, activation=activation), order)


def _in_one_form(
    ops: Ops, parts: Sequence[Weight], dtype: str
) -> tuple[list[Tensor] | list[WeightCodes], Tensor | None]:
    """Return ``parts`` as the kernels take them, and the order [K] of their inputs; None: as they come."""
    coded = [part for part in parts if isinstance(part, QuantizedWeight)]
    if len(coded) == len(parts):
        form, orders = _common_form(ops, coded), [_order(part) for part in coded]
        if form is not None and all(_same(order, orders[0]) for order in orders):
            ordered = [_in_order(part, orders[0]) for part in coded]
            has_zeros = any(part.zeros is not None or part.scheme.bits != form.bits for part in coded)
            if all(part is not None for part in ordered):
                inputs = _common_inputs(coded)
                whole = [part for part in ordered if part is not None]
                return [_to_kernel(part, form, inputs, has_zeros=has_zeros) for part in whole], orders[0]
    if coded:
        _log.info(
            "codes_widened",
            to=dtype,
            schemes=sorted({str(part.scheme) for part in coded}),
            beside_floats=len(coded) < len(parts),
        )
    return [_floats(part, dtype) for part in parts], None


def _floats(part: Weight, dtype: str) -> Tensor:
    floats = dequantize(part) if isinstance(part, QuantizedWeight) else part
    return floats if dtype_name(floats.dtype) == dtype else floats.to(torch_dtype(dtype))


def form_of(ops: Ops, scheme: Scheme) -> Quantization | None:
    """Return the form in which ``ops`` keep such codes; None if they want floats."""
    return ops.form_of_codes(scheme.bits, scheme.group, int8_activations=scheme.activations is not None)


def bytes_of_weight(ops: Ops, scheme: Scheme) -> float | None:
    """Return what a weight takes with its share of a scale and a zero, None if ``ops`` want floats."""
    form = form_of(ops, scheme)
    if form is None:
        return None
    has_zeros = not scheme.symmetric or scheme.bits != form.bits
    return form.weight_bytes + (1 / form.group if has_zeros else 0)


def _common_form(ops: Ops, parts: Sequence[QuantizedWeight]) -> Quantization | None:
    """Return the form that holds the codes of all; None if ``ops`` want some of them as floats."""
    forms = []
    for part in parts:
        holds_all = part.scheme.group is not None and part.scheme.group >= part.num_inputs
        form = form_of(ops, replace(part.scheme, group=None) if holds_all else part.scheme)
        if form is None:
            return None
        forms.append(form)
    return Quantization(
        bits=max(form.bits for form in forms),
        group=math.gcd(*(form.group for form in forms)),
        int8_activations=all(form.int8_activations for form in forms),
    )


def _common_inputs(parts: Sequence[QuantizedWeight]) -> InputCodes | None:
    """Return what all round the same inputs to; None, which is each token's own scale, where they do not agree."""
    inputs = {part.inputs for part in parts}
    if len(inputs) > 1:
        _log.info("static_activations_differ", rounded_by="token", num_parts=len(parts))
        return None
    return inputs.pop()


def _order(weight: QuantizedWeight) -> Tensor | None:
    """Return the order [K] of inputs in which those of a group are neighbours; None: as they come."""
    return None if weight.groups is None else weight.groups.argsort(stable=True)


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and torch.equal(a, b))


def _in_order(weight: QuantizedWeight, order: Tensor | None) -> QuantizedWeight | None:
    """Return the weight with its inputs in ``order``; None if its groups are not all of one size."""
    if order is None or weight.groups is None:
        return weight
    plain = replace(
        weight, scheme=replace(weight.scheme, act_order=False), groups=None, codes=weight.codes[:, order].contiguous()
    )
    return plain if torch.equal(plain.group_of_inputs(), weight.groups[order].long()) else None


def _to_kernel(
    weight: QuantizedWeight, form: Quantization, inputs: InputCodes | None, *, has_zeros: bool
) -> WeightCodes:
    """Return the same codes, scales and zeros where ``form`` wants them."""
    groups = weight.group_of_inputs()[:: form.group]
    scales = weight.scales.float()[:, groups].contiguous()
    zeros = None
    if weight.zeros is not None:
        zeros = weight.zeros[:, groups].contiguous()
    elif has_zeros:
        zeros = torch.full(scales.shape, weight.scheme.middle, dtype=torch.uint8)
    return WeightCodes(form, weight.codes.contiguous(), scales, zeros, inputs)


def _stack(parts: list[Tensor] | list[WeightCodes]) -> Tensor | Stacked | WeightCodes:
    if len(parts) == 1:
        return parts[0]
    coded = [part for part in parts if isinstance(part, WeightCodes)]
    if not coded:
        return Stacked(tuple(part for part in parts if not isinstance(part, WeightCodes)))
    zeros = [part.zeros for part in coded if part.zeros is not None]
    return WeightCodes(
        coded[0].form,
        torch.cat([part.codes for part in coded]),
        torch.cat([part.scales for part in coded]),
        torch.cat(zeros) if zeros else None,
        coded[0].inputs,
    )


def _reordered(linear: Linear, order: Tensor | None) -> Linear:
    if order is None:
        return linear

    def product(x: Tensor, added: Tensor | None = None) -> Tensor:
        return linear(x.index_select(1, order), added)

    return product
