"""Scaling a unit's inputs without changing the model: what produces them is divided by the same scales.

Inputs come from a norm, from the values that attention mixes, or from the up projection that a gate multiplies: each of
these is linear in a weight, which takes the scales in. K inputs.
"""

from collections.abc import MutableMapping
from dataclasses import dataclass

import torch
from torch import Tensor

from penstock.compress.units import Unit
from penstock.models import ModelConfig


@dataclass(frozen=True, slots=True)
class Producer:
    """The weight that makes a unit's inputs."""

    tensors: tuple[str, ...]
    """A norm's weight, or a projection's and its bias"""
    first_row: int = 0
    """Of the projection, where inputs of the unit come from"""
    shared_by: int = 1
    """How many heads of the unit's inputs each of its heads is repeated for"""
    width: int = 0
    """Of a head"""
    is_norm: bool = False


def producer_of(unit: Unit, config: ModelConfig) -> Producer | None:
    """Return what makes a unit's inputs, None where nothing could take scales in.

    That is so after the last norm, which nothing of its layer follows; where there is no norm before a block; and for
    experts' first projections, which share their input with each other and the gate that chooses them.
    """
    assert unit.layer is not None
    prefix = f"model.layers.{unit.layer}"
    has_experts = unit.component == "mlp" and config.layers[unit.layer].experts is not None
    match unit.role:
        case "qkv":
            name = config.norms.before_attention
            return None if name is None else Producer((f"{prefix}.{name}.weight",), is_norm=True)
        case "gate_up":
            name = config.norms.before_mlp
            return None if name is None or has_experts else Producer((f"{prefix}.{name}.weight",), is_norm=True)
        case "o":
            heads, kv_heads, width = config.num_heads, config.num_kv_heads, config.head_dim
            fused = config.fused_projections
            module = f"{prefix}.self_attn.{'qkv_proj' if fused else 'v_proj'}"
            first = (heads + kv_heads) * width if fused else 0
            return Producer(_with_bias(module, config.qkv_bias), first, shared_by=heads // kv_heads, width=width)
        case "down" if not has_experts:
            fused = config.fused_projections
            module = f"{prefix}.mlp.{'gate_up_proj' if fused else 'up_proj'}"
            return Producer(_with_bias(module, config.mlp_bias), config.intermediate_size if fused else 0)
    return None


def fold(
    producer: Producer,
    scales: Tensor,
    tensors: MutableMapping[str, Tensor],
    *,
    dtype: torch.dtype,
    norm_offset: float,
) -> Tensor:
    """Divide what ``producer`` makes by ``scales`` [K], in ``tensors``, which are float32 and stored in ``dtype``.

    Returns the scales [K] to multiply the unit's weight by: those given, but for what rounding to ``dtype`` does.
    """
    if producer.is_norm:
        (name,) = producer.tensors
        weight = tensors[name] + norm_offset
        stored = (weight / scales - norm_offset).to(dtype).float()
        tensors[name] = stored
        folded = stored + norm_offset
        return torch.where(folded == 0, scales, weight / folded)
    rows = scales
    if producer.shared_by > 1:
        # One of each run of heads that read the same values.
        rows = scales.view(-1, producer.shared_by, producer.width)[:, 0].flatten()
    end = producer.first_row + len(rows)
    for name in producer.tensors:
        tensor = tensors[name].clone()
        part = tensor[producer.first_row : end]
        part.div_(rows if tensor.ndim == 1 else rows.unsqueeze(1))
        tensors[name] = tensor
    return scales


def _with_bias(module: str, has_bias: bool) -> tuple[str, ...]:
    return (f"{module}.weight", f"{module}.bias") if has_bias else (f"{module}.weight",)
