"""What of a model can be compressed: its matrices, by what they are for, those that share an input as one unit.

E hidden width, N outputs, K inputs.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from penstock.kernels import Linear, Ops, ReferenceOps, Stacked, WeightCodes
from penstock.kernels.dtypes import torch_dtype
from penstock.models import ModelConfig
from penstock.models.frame import DecoderLayer
from penstock.models.parts import Loader
from penstock.models.vision.load import make_encoder
from penstock.models.weights import TensorSource
from penstock.quant import QuantizedWeight

_PROJECTORS = ("multi_modal_projector", "connector", "visual.merger")

Observer = Callable[[tuple[str, ...], Tensor], None]
"""Is told a unit's modules and what they are about to read [T, K]"""


@dataclass(frozen=True, slots=True)
class Unit:
    """Matrices that read the same input and run as one product, such as queries, keys and values."""

    modules: tuple[str, ...]
    """As the checkpoint calls them, without ``.weight``"""
    shapes: tuple[tuple[int, int], ...]
    """[N, K] of each"""
    layer: int | None
    """None of the table of embeddings and the head"""
    component: str
    """attention or mlp; embeddings or lm_head; vision_encoder or projector"""
    role: str
    """What it is in its block: qkv, o, gate_up, down, or gate, which chooses experts and is never compressed; in no
    layer embeddings, lm_head, tied, which is both, or seeing"""

    @property
    def num_inputs(self) -> int:
        """K."""
        return self.shapes[0][1]

    @property
    def num_weights(self) -> int:
        """Elements of all its matrices."""
        return sum(outputs * inputs for outputs, inputs in self.shapes)

    @property
    def label(self) -> str:
        """One name for all its modules: ``model.layers.0.self_attn.q_proj+k_proj+v_proj``."""
        prefix = self.modules[0].rpartition(".")[0]
        return "+".join([self.modules[0], *(name.removeprefix(f"{prefix}.") for name in self.modules[1:])])


class NamedTensors:
    """A ``TensorSource`` that puts some tensors in others' place and knows which matrices were taken last."""

    def __init__(
        self, source: TensorSource, replaced: Mapping[str, Tensor] | None = None, *, as_served: bool = False
    ) -> None:
        """``as_served``: what is in codes stays so, and activations are rounded where codes say it; else floats."""
        self._source = source
        self._as_served = as_served
        self._replaced = replaced or {}
        self._matrices: list[tuple[str, tuple[int, int]]] = []

    def take(self, name: str, shape: tuple[int, ...], dtype: str) -> Tensor:
        """Return the tensor ``name``; see ``TensorSource``."""
        if len(shape) == 2:
            self._matrices.append((name.removesuffix(".weight"), (shape[0], shape[1])))
        replacement = self._replaced.get(name)
        return self._source.take(name, shape, dtype) if replacement is None else replacement.to(torch_dtype(dtype))

    def take_codes(self, module: str, shape: tuple[int, int]) -> QuantizedWeight | None:
        """Return codes where they are to stay, None where they are asked for as the floats they stand for."""
        codes = self._source.take_codes(module, shape) if self._as_served else None
        if codes is not None:
            self._matrices.append((module, shape))
        return codes

    def claim(self) -> list[tuple[str, tuple[int, int]]]:
        """Return the modules, and shapes, of the matrices that were taken since this was last asked."""
        claimed, self._matrices = self._matrices, []
        return claimed


class WatchedOps:
    """Kernels that say which matrices each product is made of, and what it reads when it runs."""

    def __init__(self, inner: Ops, tensors: NamedTensors, observe: Observer | None = None) -> None:
        self.name = inner.name
        self.products: list[tuple[str, list[tuple[str, tuple[int, int]]]]] = []
        """Kind (``linear``, ``gated``, ``exact``), modules and shapes of each product, in a layer's order"""
        self._inner = inner
        self._tensors = tensors
        self._observe = observe
        self.activation_dtype = inner.activation_dtype
        self.form_of_codes = inner.form_of_codes
        self.cache_shapes = inner.cache_shapes
        self.own = inner.own
        self.record = inner.record
        self.prepare_embedding = inner.prepare_embedding
        self.add = inner.add
        self.rms_norm = inner.rms_norm
        self.layer_norm = inner.layer_norm
        self.rope_angles = inner.rope_angles
        self.rope_write_kv = inner.rope_write_kv
        self.plan_attention = inner.plan_attention

    def prepare_linear(
        self,
        weight: Tensor | Stacked | WeightCodes,
        bias: Tensor | None,
        *,
        exact: bool = False,
        activation: str | None = None,
    ) -> Linear:
        """See ``Ops``."""
        prepared = self._inner.prepare_linear(weight, bias, exact=exact, activation=activation)
        return self._watched("exact" if exact else "linear", prepared)

    def prepare_gated_linear(
        self,
        gate: Tensor | WeightCodes,
        up: Tensor | WeightCodes,
        gate_bias: Tensor | None,
        up_bias: Tensor | None,
        *,
        activation: str = "silu",
    ) -> Linear:
        """See ``Ops``."""
        prepared = self._inner.prepare_gated_linear(gate, up, gate_bias, up_bias, activation=activation)
        return self._watched("gated", prepared)

    def _watched(self, kind: str, prepared: Linear) -> Linear:
        matrices = self._tensors.claim()
        self.products.append((kind, matrices))
        observe = self._observe
        if observe is None:
            return prepared
        modules = tuple(name for name, _ in matrices)

        def run(x: Tensor, added: Tensor | None = None) -> Tensor:
            observe(modules, x)
            return prepared(x, added)

        return run


class _Shapes:
    """A ``TensorSource`` of tensors without contents."""

    def take(self, name: str, shape: tuple[int, ...], dtype: str) -> Tensor:
        return torch.empty(shape, dtype=torch_dtype(dtype), device="meta")

    def take_codes(self, module: str, shape: tuple[int, int]) -> QuantizedWeight | None:
        return None


def ends_of(config: ModelConfig) -> list[Unit]:
    """Return the table of embeddings and the head, which are one unit where they are one matrix."""
    shapes = ((config.vocab_size, config.hidden_size),)
    table = ("model.embed_tokens",)
    if config.tie_word_embeddings:
        return [Unit(table, shapes, None, "embeddings", "tied")]
    return [
        Unit(table, shapes, None, "embeddings", "embeddings"),
        Unit(("lm_head",), shapes, None, "lm_head", "lm_head"),
    ]


def seeing_units(path: Path, config: ModelConfig) -> list[Unit]:
    """Return the units of what the model in directory ``path`` sees with, encoder and projector, if it does."""
    tensors = NamedTensors(_Shapes())
    ops = WatchedOps(ReferenceOps(), tensors)
    if make_encoder(path, Loader(config, tensors, "float32", ops, adaptable=False)) is None:
        return []
    units = []
    for kind, matrices in ops.products:
        # Tables of positions are looked up; what is exact are patches' colours.
        taken = [one for one in matrices if not one[0].endswith("_embedding")]
        if kind == "exact" or not taken:
            continue
        modules, shapes = zip(*taken, strict=True)
        component = "projector" if modules[0].startswith(_PROJECTORS) else "vision_encoder"
        units.append(Unit(modules, shapes, None, component, "seeing"))
    return units


def units_of(config: ModelConfig) -> list[Unit]:
    """Return the units of a native decoder's layers, in the order in which a layer runs them."""
    return [unit for index in range(config.num_layers) for unit in _layer_units(config, index)]


def _layer_units(config: ModelConfig, index: int) -> list[Unit]:
    tensors = NamedTensors(_Shapes())
    ops = WatchedOps(ReferenceOps(), tensors)
    DecoderLayer.load(Loader(config, tensors, "float32", ops, adaptable=False), index)
    units = []
    attention = ["o", "qkv"]
    for kind, matrices in ops.products:
        if attention:
            component, role = "attention", attention.pop()
        else:
            component, role = "mlp", {"gated": "gate_up", "linear": "down", "exact": "gate"}[kind]
        modules, shapes = zip(*matrices, strict=True)
        units.append(Unit(modules, shapes, index, component, role))
    return units
