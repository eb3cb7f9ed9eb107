"""What a layer is made of: attention and feed-forward blocks, and how each is taken from a checkpoint.

T packed tokens, E hidden width, H query heads, G KV heads, D head width, N experts, A experts that a token uses.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from penstock.kernels import Attention, BatchLayout, HeadNorms, KVBlocks, Linear, Ops
from penstock.kernels.dtypes import ELEMENT_BYTES
from penstock.kernels.native.array import as_torch, joined, plus
from penstock.kernels.tensor import Tensor
from penstock.models.config import Experts, ModelConfig
from penstock.models.lora import Adapted, adapt
from penstock.models.rope import rotary_order
from penstock.models.weights import TensorSource
from penstock.quant import Weight, prepare_gated_linear, prepare_linear, select_rows


class Loader:
    """Takes tensors from a checkpoint in the form kernels want them, and counts them."""

    def __init__(self, config: ModelConfig, weights: TensorSource, dtype: str, ops: Ops, *, adaptable: bool) -> None:
        self.config = config
        self.adaptable = adaptable
        """Whether adapters may be added to every projection."""
        self.ops = ops
        self._sizes: dict[str, int] = {}
        """Parameters of what was taken, by name"""
        self._weights = weights
        self.dtype = dtype
        """What weights run in"""
        self._activation_dtype = ops.activation_dtype(dtype)

    @property
    def num_parameters(self) -> int:
        """Of all that was taken; what was taken twice counts once."""
        return sum(self._sizes.values())

    @property
    def weights_bytes(self) -> int:
        """Bytes of all that in the dtype weights run in."""
        return self.num_parameters * ELEMENT_BYTES[self.dtype]

    def tensor(self, name: str, *shape: int) -> Tensor:
        """Return a tensor in the dtype weights run in."""
        tensor = self._weights.take(name, shape, self.dtype)
        self._sizes[name] = tensor.numel()
        return tensor

    def norm(self, name: str, size: int) -> Tensor:
        """Return a norm's weight [size] in the dtype of activations."""
        weight = self._weights.take(f"{name}.weight", (size,), self._activation_dtype)
        self._sizes[f"{name}.weight"] = size
        offset = self.config.norms.offset
        return plus(weight, offset) if offset else weight

    def optional_norm(self, prefix: str, name: str | None) -> Tensor | None:
        """Return the weight [E] of a layer's norm, None if it has none there."""
        return None if name is None else self.norm(f"{prefix}.{name}", self.config.hidden_size)

    def weight(self, name: str, num_outputs: int, num_inputs: int) -> Weight:
        """Return a projection's weight, in codes if it is kept so."""
        codes = self._weights.take_codes(name, (num_outputs, num_inputs))
        if codes is None:
            return self.tensor(f"{name}.weight", num_outputs, num_inputs)
        self._sizes[f"{name}.weight"] = codes.codes.numel()
        return codes

    def biases(self, *names: str, sizes: Sequence[int]) -> list[Tensor]:
        """Return projections' biases."""
        return [self.tensor(f"{name}.bias", size) for name, size in zip(names, sizes, strict=True)]

    def side_by_side(
        self, weights: Sequence[Weight], biases: Sequence[Tensor] = (), *, activation: str | None = None
    ) -> Linear:
        """Return projections of the same inputs as one."""
        bias = joined(biases) if biases else None
        return prepare_linear(self.ops, weights, bias, self.dtype, activation=activation)

    def linear(
        self, name: str, num_outputs: int, num_inputs: int, *, bias: bool = False, activation: str | None = None
    ) -> Linear:
        """Return a projection, and what is to be done to its result."""
        first, num_inputs = self.first_factor(name, num_inputs)
        weight = self.weight(name, num_outputs, num_inputs)
        biases = self.biases(name, sizes=[num_outputs]) if bias else []
        return chained(first, self.side_by_side([weight], biases, activation=activation))

    def gated_linear(self, gate: str, up: str, num_outputs: int, num_inputs: int, *, bias: bool = False) -> Linear:
        """Return two projections of which one gates the other."""
        first, num_inputs = self.first_factor(gate, num_inputs)
        gate_weight, up_weight = (self.weight(name, num_outputs, num_inputs) for name in (gate, up))
        biases = self.biases(gate, up, sizes=[num_outputs] * 2) if bias else []
        return chained(first, self.gated(gate_weight, up_weight, biases))

    def first_factor(self, name: str, num_inputs: int) -> tuple[Linear | None, int]:
        """Return what runs before the projection ``name`` and those beside it, and how many inputs that leaves them.

        That is the first of two matrices where their product is kept as such; None where it is one matrix.
        """
        rank = self.config.low_rank.get(name)
        if rank is None:
            return None, num_inputs
        return self.side_by_side([self.weight(f"{name}.low_rank", rank, num_inputs)]), rank

    def gated(self, gate: Weight, up: Weight, biases: Sequence[Tensor] = ()) -> Linear:
        """Return the same from weights [F, K] and biases [F]."""
        gate_bias, up_bias = biases or (None, None)
        return prepare_gated_linear(
            self.ops, gate, up, gate_bias, up_bias, self.dtype, activation=self.config.activation
        )


def chained(first: Linear | None, second: Linear) -> Linear:
    """Return the product of one after the other, or of the second alone."""
    if first is None:
        return second

    def product(x: Tensor, added: Tensor | None = None) -> Tensor:
        return second(first(x), added)

    return product


@dataclass(frozen=True, slots=True)
class Step:
    """What all layers of one forward pass share."""

    layout: BatchLayout
    attentions: dict[int | None, Attention]
    """By window"""
    angles: list[tuple[Tensor, Tensor]]
    """Cosines and sines for each of ``ModelConfig.ropes``"""
    adapted: Adapted


class AttentionBlock:
    """Queries, keys and values; rotation; attention; the way back."""

    def __init__(self, loader: Loader, prefix: str, index: int) -> None:
        config = self._config = loader.config
        layer = config.layers[index]
        self._index = index
        self._ops = loader.ops
        self._window = layer.window
        self._rope_index = config.ropes.index(layer.rope)
        E, D = config.hidden_size, config.head_dim
        self._q_width, self._kv_width = config.num_heads * D, config.num_kv_heads * D
        order = rotary_order(layer.rope, D)
        self._qkv = self._load_qkv(loader, prefix, order)
        self._head_norms: HeadNorms | None = None
        self._row_norms: tuple[Tensor, Tensor] | None = None
        if config.qk_norm == "heads":
            q_norm, k_norm = (_reorder(loader.norm(f"{prefix}.{name}_norm", D), order) for name in "qk")
            self._head_norms = HeadNorms(q_norm, k_norm, config.rms_norm_eps)
        elif config.qk_norm == "projection":
            self._row_norms = (
                _reorder(loader.norm(f"{prefix}.q_norm", self._q_width), order),
                _reorder(loader.norm(f"{prefix}.k_norm", self._kv_width), order),
            )
        self._o = loader.linear(f"{prefix}.o_proj", E, self._q_width, bias=config.o_bias)

    def mix(self, x: Tensor, kv: KVBlocks, step: Step) -> Tensor:
        """Return what the heads make of ``x`` [T, E], which is [T, H * D]; writes keys and values."""
        config = self._config
        qkv = self._qkv(x)
        adapt(step.adapted, (self._index, "qkv"), x, qkv)
        if self._row_norms is not None:
            self._normalize_rows(qkv, *self._row_norms)
        q_THD = self._ops.rope_write_kv(
            qkv,
            kv,
            step.layout,
            *step.angles[self._rope_index],
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            norms=self._head_norms,
        )
        return step.attentions[self._window](q_THD, kv, scale=config.attention_scale).flatten(1)

    def project(self, mixed: Tensor, added: Tensor | None, adapted: Adapted = ()) -> Tensor:
        """Return [T, E] from ``mixed`` [T, H * D], plus ``added``, which may be overwritten."""
        out = self._o(mixed, added)
        adapt(adapted, (self._index, "o"), mixed, out)
        return out

    def _normalize_rows(self, qkv: Tensor, q_norm: Tensor, k_norm: Tensor) -> None:
        eps, keys = self._config.rms_norm_eps, slice(self._q_width, self._q_width + self._kv_width)
        for rows, norm in ((qkv[:, : self._q_width], q_norm), (qkv[:, keys], k_norm)):
            self._ops.rms_norm(rows, norm, eps, out=rows)

    def _load_qkv(self, loader: Loader, prefix: str, order: Tensor | None) -> Linear:
        widths = [self._q_width, self._kv_width, self._kv_width]
        names, sizes = [f"{prefix}.{name}_proj" for name in "qkv"], widths
        if self._config.fused_projections:
            names, sizes = [f"{prefix}.qkv_proj"], [sum(widths)]
        first, num_inputs = loader.first_factor(names[0], self._config.hidden_size)
        weights = [loader.weight(name, size, num_inputs) for name, size in zip(names, sizes, strict=True)]
        biases = loader.biases(*names, sizes=sizes) if self._config.qkv_bias else []
        if order is not None:
            rows = self._rows(sizes, widths, order)
            weights = [select_rows(weight, of_part) for weight, of_part in zip(weights, rows, strict=True)]
            if biases:
                biases = [as_torch(bias)[of_part] for bias, of_part in zip(biases, rows, strict=True)]
        return chained(first, loader.side_by_side(weights, biases))

    @staticmethod
    def _rows(sizes: list[int], widths: list[int], order: Tensor) -> list[Tensor]:
        """Return the order of rows in parts of ``sizes``, which hold queries, keys and values of ``widths``."""
        q_width, k_width, v_width = widths
        rows = _reorder(torch.arange(q_width + k_width), order)
        rows = torch.cat([rows, torch.arange(v_width) + q_width + k_width])
        return [part - int(part.min()) for part in torch.split(rows, sizes)]


def _reorder(rows: Tensor, order: Tensor | None) -> Tensor:
    """Bring ``rows`` [heads * D, ...] of each head into ``order``."""
    if order is None:
        return rows
    rows = as_torch(rows)
    return rows.view(-1, len(order), *rows.shape[1:])[:, order].flatten(0, 1)


class FeedForward(Protocol):
    """The second block of a layer."""

    def __call__(self, x: Tensor, added: Tensor | None, adapted: Adapted = ()) -> Tensor:
        """Return [T, E] from ``x`` [T, E], plus ``added``, which may be overwritten."""


def load_feed_forward(loader: Loader, prefix: str, index: int) -> FeedForward:
    """Return the feed-forward of layer ``index``, whose names begin with ``prefix``."""
    experts = loader.config.layers[index].experts
    if experts is not None:
        return MixtureOfExperts(loader, f"{prefix}.{experts.name}", experts)
    if loader.adaptable:
        return AdaptableMLP(loader, f"{prefix}.mlp", index)
    return GatedMLP.load(loader, f"{prefix}.mlp")


_ROWS_AT_ONCE = 512
"""What is between the two products of a feed-forward is several times as wide as the model: 40 MB for 2048 tokens of a
width of 4864. A result does not depend on how many tokens are computed at once."""


@dataclass(frozen=True, slots=True)
class GatedMLP:
    """down(activation(gate(x)) * up(x))."""

    gate_up: Linear
    down: Linear

    @classmethod
    def load(cls, loader: Loader, name: str) -> "GatedMLP":
        """Take the one called ``name``."""
        config = loader.config
        E, width, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        if config.fused_projections:
            first, num_inputs = loader.first_factor(f"{name}.gate_up_proj", E)
            both = loader.weight(f"{name}.gate_up_proj", 2 * width, num_inputs)
            gated = loader.gated(select_rows(both, slice(width)), select_rows(both, slice(width, None)))
            gate_up = chained(first, gated)
        else:
            gate_up = loader.gated_linear(f"{name}.gate_proj", f"{name}.up_proj", width, E, bias=bias)
        return cls(gate_up, loader.linear(f"{name}.down_proj", E, width, bias=bias))

    def __call__(self, x: Tensor, added: Tensor | None, adapted: Adapted = ()) -> Tensor:
        """See ``FeedForward``."""
        if len(x) <= _ROWS_AT_ONCE:
            return self.down(self.gate_up(x), added)
        out = torch.empty_like(x) if added is None else added
        for first in range(0, len(x), _ROWS_AT_ONCE):
            rows = slice(first, first + _ROWS_AT_ONCE)
            out[rows] = self.down(self.gate_up(x[rows]), None if added is None else added[rows])
        return out


class AdaptableMLP:
    """The same, where adapters may add to gate and up before they meet: their product is not fused."""

    def __init__(self, loader: Loader, name: str, index: int) -> None:
        config, self._index = loader.config, index
        E, width, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        parts = (
            [("gate_up_proj", 2 * width)] if config.fused_projections else [("gate_proj", width), ("up_proj", width)]
        )
        first, num_inputs = loader.first_factor(f"{name}.{parts[0][0]}", E)
        weights = [loader.weight(f"{name}.{part}", size, num_inputs) for part, size in parts]
        biases = [loader.tensor(f"{name}.{part}.bias", size) for part, size in parts] if bias else []
        self._gate_up = chained(first, loader.side_by_side(weights, biases))
        self._down = loader.linear(f"{name}.down_proj", E, width, bias=bias)
        self._is_gelu = config.activation == "gelu_tanh"

    def __call__(self, x: Tensor, added: Tensor | None, adapted: Adapted = ()) -> Tensor:
        """See ``FeedForward``."""
        gate_up = self._gate_up(x)
        adapt(adapted, (self._index, "gate_up"), x, gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        hidden = (
            torch.nn.functional.gelu(gate, approximate="tanh") if self._is_gelu else torch.nn.functional.silu(gate)
        ) * up
        out = self._down(hidden, added)
        adapt(adapted, (self._index, "down"), hidden, out)
        return out


class MixtureOfExperts:
    """Each token's sum over the A experts its gate prefers, weighted by the gate's probabilities.

    Shazeer et al., "Outrageously Large Neural Networks" (2017). Tokens are sorted by expert, so that each expert with
    tokens has one product; a token's result does not depend on what else is in the batch.
    """

    def __init__(self, loader: Loader, name: str, experts: Experts) -> None:
        E, width = loader.config.hidden_size, experts.intermediate_size
        self._experts = experts
        # Exact, because a gate that errs a little chooses other experts.
        self._gate = loader.ops.prepare_linear(
            loader.tensor(f"{name}.gate.weight", experts.num_experts, E), None, exact=True
        )
        self._mlps = [self._load_expert(loader, f"{name}.experts.{i}", width, E) for i in range(experts.num_experts)]

    def _load_expert(self, loader: Loader, name: str, num_hidden: int, num_outputs: int) -> GatedMLP:
        gate, up, down = (f"{name}.{part}" for part in self._experts.gate_up_down)
        gate_up = loader.gated_linear(gate, up, num_hidden, num_outputs)
        return GatedMLP(gate_up, loader.linear(down, num_outputs, num_hidden))

    def __call__(self, x: Tensor, added: Tensor | None, adapted: Adapted = ()) -> Tensor:
        """See ``FeedForward``."""
        num_active = self._experts.num_active
        shares_TA, chosen_TA = self._gate(x).float().softmax(-1).topk(num_active)
        if self._experts.normalize:
            shares_TA = shares_TA / shares_TA.sum(-1, keepdim=True)
        order = chosen_TA.flatten().argsort(stable=True)
        # Row i of those sorted is token order[i] // A.
        rows = x[order // num_active]
        counts = torch.bincount(chosen_TA.flatten(), minlength=len(self._mlps)).tolist()
        parts = [mlp(part, None) for mlp, part in zip(self._mlps, torch.split(rows, counts), strict=True) if len(part)]
        results = torch.empty_like(rows)
        results[order] = torch.cat(parts)
        results_TAE = results.view(len(x), num_active, -1) * shares_TA.to(x.dtype).unsqueeze(-1)
        total = torch.zeros_like(x) if added is None else added
        # One after another: a sum over a dimension may be taken in another order for another number of tokens.
        for part in results_TAE.unbind(1):
            total = total + part
        return total
