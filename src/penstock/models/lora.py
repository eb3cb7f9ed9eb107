"""Low-rank adapters of a native decoder, from a directory as PEFT writes it.

Hu et al., "LoRA" (2021): a projection W x becomes W x + s B (A x) with A [r, K] and B [N, r]. Where projections are
computed side by side, their As stand on top of each other and their Bs in a block diagonal. T packed tokens.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from penstock.errors import ModelUnreadable
from penstock.kernels import Linear, Ops
from penstock.kernels.dtypes import torch_dtype
from penstock.kernels.tensor import Tensor
from penstock.models.config import ModelConfig
from penstock.models.files import plain_name
from penstock.models.rope import rotary_order

_MODEL = "base_model.model."
_PREFIX = f"{_MODEL}model.layers."
_REFUSED = ("use_dora", "fan_in_fan_out", "modules_to_save", "rank_pattern", "alpha_pattern", "layer_replication")
"""Settings of adapter_config.json that change the computation and are not implemented"""


@dataclass(frozen=True, slots=True)
class LowRank:
    """B (A x), the scale included."""

    a: Linear
    b: Linear

    def __call__(self, x: Tensor) -> Tensor:
        """Return [T, N] from ``x`` [T, K]."""
        return self.b(self.a(x))


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """A loaded adapter. Two are the same only if they are one object."""

    sites: dict[tuple[int, str], LowRank] = field(repr=False)
    """By layer and block: ``qkv``, ``o``, ``gate_up``, ``down``"""


Adapted = Sequence[tuple[Tensor, Adapter]]
"""Rows of a step [t] int64 and the adapter they use; rows in none use the model as it is"""


def adapt(adapted: Adapted, site: tuple[int, str], x: Tensor, out: Tensor) -> None:
    """Add to ``out`` [T, N], which a projection made of ``x`` [T, K], what adapters add at ``site``."""
    for rows, adapter in adapted:
        low_rank = adapter.sites.get(site)
        if low_rank is not None:
            out.index_add_(0, rows, low_rank(x[rows]).to(out.dtype))


def read_adapter(path: Path, config: ModelConfig, ops: Ops, dtype: str) -> Adapter:
    """Return the adapter in directory ``path`` for a model of ``config``. Raises ``ModelUnreadable``."""
    # Brings torch.
    from safetensors.torch import load_file

    scale, rank = _read_settings(path / "adapter_config.json")
    file = path / "adapter_model.safetensors"
    try:
        tensors = {_plain(name): tensor for name, tensor in load_file(file).items()}
    except (OSError, SafetensorError) as error:
        raise ModelUnreadable(f"{file} cannot be read ({error}); fetch the file again") from error
    pairs = _Pairs(tensors, file, rank)
    sites = {}
    for layer in range(config.num_layers):
        for site, blocks in _blocks(config, layer).items():
            low_rank = pairs.take(layer, blocks, scale, ops, dtype)
            if low_rank is not None:
                sites[layer, site] = low_rank
    if pairs.left:
        raise ModelUnreadable(
            f"{file} adapts {min(pairs.left)}, which is not one of the projections of this model's layers that can be "
            "adapted (queries, keys, values, attention's output, and the feed-forward without experts)"
        )
    return Adapter(sites)


def _plain(name: str) -> str:
    """Return what an adapter of a model that is text alone would call a tensor."""
    return f"{_MODEL}{plain_name(name.removeprefix(_MODEL))}" if name.startswith(_MODEL) else name


def _read_settings(file: Path) -> tuple[float, int]:
    """Return the scale and the rank."""
    try:
        settings: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        rank, alpha = int(settings["r"]), float(settings["lora_alpha"])
        refused = [name for name in _REFUSED if settings.get(name)]
        kind, bias = settings.get("peft_type", "LORA"), settings.get("bias", "none")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelUnreadable(f"{file} is not a LoRA adapter's configuration ({error!r}); fetch it again") from error
    if kind != "LORA" or bias != "none" or refused or rank < 1:
        what = f"{refused[0]} is set" if refused else f"its type is {kind}, its bias {bias!r} and its rank {rank}"
        raise ModelUnreadable(f"{file}: {what}, and Penstock runs plain LoRA; merge the adapter into the model instead")
    return alpha / rank**0.5 if settings.get("use_rslora") else alpha / rank, rank


@dataclass(frozen=True, slots=True)
class _Block:
    """One of the projections that are computed side by side."""

    name: str
    num_outputs: int
    rows: Tensor | None = None
    """[N] the order in which its outputs are kept, if not as they come"""


def _blocks(config: ModelConfig, layer: int) -> dict[str, tuple[int, list[_Block]]]:
    """Return, by site, the inputs and the projections of a layer."""
    E, D, F = config.hidden_size, config.head_dim, config.intermediate_size
    q_width, kv_width = config.num_heads * D, config.num_kv_heads * D
    order = rotary_order(config.layers[layer].rope, D)
    order = torch.arange(D) if order is None else order
    q_rows, k_rows = ((torch.arange(n)[:, None] * D + order).flatten() for n in (config.num_heads, config.num_kv_heads))
    if config.fused_projections:
        v_rows = torch.arange(kv_width) + q_width + kv_width
        qkv = [_Block("self_attn.qkv_proj", q_width + 2 * kv_width, torch.cat([q_rows, k_rows + q_width, v_rows]))]
        gate_up = [_Block("mlp.gate_up_proj", 2 * F)]
    else:
        qkv = [_Block("self_attn.q_proj", q_width, q_rows), _Block("self_attn.k_proj", kv_width, k_rows)]
        qkv.append(_Block("self_attn.v_proj", kv_width))
        gate_up = [_Block("mlp.gate_proj", F), _Block("mlp.up_proj", F)]
    blocks = {"qkv": (E, qkv), "o": (q_width, [_Block("self_attn.o_proj", E)])}
    if config.layers[layer].experts is None:
        blocks |= {"gate_up": (E, gate_up), "down": (F, [_Block("mlp.down_proj", E)])}
    return blocks


class _Pairs:
    """The As and Bs of a file."""

    def __init__(self, tensors: dict[str, Tensor], file: Path, rank: int) -> None:
        self._tensors = tensors
        self._file = file
        self._rank = rank
        self.left = set(tensors)
        """Names nobody took"""

    def take(self, layer: int, site: tuple[int, list[_Block]], scale: float, ops: Ops, dtype: str) -> LowRank | None:
        """Return what the file has for a site, None if that is nothing."""
        num_inputs, blocks = site
        a_parts: list[Tensor] = []
        b_parts: list[tuple[int, Tensor]] = []
        first = 0
        for block in blocks:
            name = f"{_PREFIX}{layer}.{block.name}"
            if f"{name}.lora_A.weight" in self._tensors:
                a_parts.append(self._tensor(f"{name}.lora_A.weight", self._rank, num_inputs))
                b = self._tensor(f"{name}.lora_B.weight", block.num_outputs, self._rank) * scale
                b_parts.append((first, b if block.rows is None else b[block.rows]))
            first += block.num_outputs
        if not a_parts:
            return None
        b = torch.zeros(first, len(b_parts) * self._rank)
        for i, (row, part) in enumerate(b_parts):
            b[row : row + len(part), i * self._rank : (i + 1) * self._rank] = part
        # Small, and what the fine-tuning was about: kept exact whatever the model is kept in.
        a, wide_b = torch.cat(a_parts).to(torch_dtype(dtype)), b.to(torch_dtype(dtype))
        return LowRank(ops.prepare_linear(a, None, exact=True), ops.prepare_linear(wide_b, None, exact=True))

    def _tensor(self, name: str, *shape: int) -> Tensor:
        tensor = self._tensors.get(name)
        if tensor is None or tuple(tensor.shape) != shape:
            found = "missing" if tensor is None else str(list(tensor.shape))
            raise ModelUnreadable(f"{self._file}: {name} is {found}, and this model needs {list(shape)}")
        self.left.discard(name)
        return tensor.float()
