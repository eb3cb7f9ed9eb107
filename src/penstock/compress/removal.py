"""Taking layers, attention heads and feed-forward channels out of a model, so that a really smaller one is left."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from penstock.compress.calibration.statistics import InputStatistics
from penstock.compress.checkpoint import Checkpoint
from penstock.compress.layer import CompressedLayer, UnitReport, relative_error
from penstock.compress.methods.awq import product_error
from penstock.compress.plan import CoverageRow, coverage
from penstock.compress.recipe import KEEP, Removal, Treatment
from penstock.compress.units import Unit
from penstock.errors import InvalidRecipe
from penstock.json_objects import read_json_object
from penstock.models import read_config
from penstock.quant import Scheme

_CHANNELS_TOGETHER = 16
"""The number of channels that stay is a multiple: the vectors that kernels read, and no odd shapes"""
_WIDTH_BY_HEADS = ("LlamaForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM")
"""Whose width transformers 5 wants to be a multiple of the number of heads, whatever a head's width"""
_BY_LAYER = ("layer_types", "no_rope_layers")
"""Lists in config.json with a value for each layer"""


class Removing:
    """Layers, attention heads and feed-forward channels that go; see ``changes.Change``."""

    def __init__(self, removal: Removal, checkpoint: Checkpoint, units: list[Unit]) -> None:
        """Raise ``InvalidRecipe`` for what the model does not allow."""
        config = self._config = checkpoint.config
        self._checkpoint = checkpoint
        self.treatments = dict.fromkeys(units, KEEP)
        self.ends: dict[Unit, Treatment] = {}
        self.schemes: dict[str, Scheme] = {}
        if removal.layers >= config.num_layers:
            raise InvalidRecipe(
                f"remove.layers is {removal.layers}, and the model has {config.num_layers} layers; leave at least one"
            )
        self.num_layers = config.num_layers - removal.layers
        self._num_channels, self._num_groups = config.intermediate_size, config.num_kv_heads
        if removal.channels:
            if any(layer.experts is not None for layer in config.layers):
                raise InvalidRecipe("remove.channels: this model has experts; only layers and heads can be removed")
            self._num_channels = _left("channels", removal.channels, config.intermediate_size, _CHANNELS_TOGETHER)
        if removal.heads:
            if config.qk_norm == "projection":
                raise InvalidRecipe(
                    "remove.heads: this model normalizes all heads as one row; those that stay need all"
                )
            self._num_groups = _left("heads", removal.heads, config.num_kv_heads, 1)
        num_heads = config.num_heads // config.num_kv_heads * self._num_groups
        if removal.heads and config.architecture in _WIDTH_BY_HEADS and config.hidden_size % num_heads:
            raise InvalidRecipe(
                f"remove.heads is {removal.heads}, which leaves {num_heads} heads; transformers and vLLM refuse a "
                f"model of this kind whose width, {config.hidden_size}, is no multiple of that: remove more or fewer"
            )
        self.outcome = replace(
            config, intermediate_size=self._num_channels, num_heads=num_heads, num_kv_heads=self._num_groups
        )
        self.coverage = [self._cover(row) for row in coverage(checkpoint, self.treatments)]

    def _cover(self, row: CoverageRow) -> CoverageRow:
        """Return a row of what is kept, as this leaves it. Norms of layers that go are counted as if they stayed."""
        if not row.num_matrices:
            return row
        config, outcome = self._config, self.outcome
        share, words = self.num_layers / config.num_layers, []
        if share < 1:
            words.append(f"{self.num_layers} of {config.num_layers} layers")
        for component, what, left, whole in (
            ("mlp", "channels", outcome.intermediate_size, config.intermediate_size),
            ("attention", "heads", outcome.num_heads, config.num_heads),
        ):
            if row.component == component and left < whole:
                share *= left / whole
                words.append(f"{left} of {whole} {what}")
        return replace(row, treatment=", ".join(words) or row.treatment, bytes_after=round(row.bytes_before * share))

    def watched(self, index: int) -> list[Unit]:
        """See ``Change``."""
        roles = []
        if self._num_channels < self._config.intermediate_size:
            roles.append("down")
        if self._num_groups < self._config.num_kv_heads:
            roles.append("o")
        return [unit for unit in self.treatments if unit.layer == index and unit.role in roles]

    def make(self, index: int, statistics: Mapping[Unit, InputStatistics]) -> CompressedLayer:
        """See ``Change``."""
        units = {unit.role: unit for unit in self.treatments if unit.layer == index}
        layer = CompressedLayer()
        for unit, seen in statistics.items():
            if unit.role == "down":
                remove_channels(self._checkpoint, units["gate_up"], unit, seen, self._num_channels, layer)
            else:
                remove_heads(self._checkpoint, units["qkv"], unit, seen, self._num_groups, layer)
        return layer

    def config_changes(self, kept: list[int], scratch: Path) -> dict[str, Any]:
        """See ``Change``. Raises ``InvalidRecipe`` where a layer's kind follows from its number, and would change."""
        config, outcome = self._config, self.outcome
        whole = read_json_object(self._checkpoint.path / "config.json", required=True)
        # Of a model that sees, the decoder's part; older files leave out what is as in upstream's class.
        values = whole if config.vision is None else whole["text_config"]
        changes: dict[str, Any] = {"num_hidden_layers": len(kept), "intermediate_size": outcome.intermediate_size}
        if outcome.num_heads < config.num_heads:
            # No longer the width of the model divided by their number.
            changes |= {
                "num_attention_heads": outcome.num_heads,
                "num_key_value_heads": outcome.num_kv_heads,
                "head_dim": config.head_dim,
            }
        if len(kept) < config.num_layers:
            changes |= {name: [values[name][i] for i in kept] for name in _BY_LAYER if values.get(name) is not None}
        if config.vision is not None:
            changes = {"text_config": values | changes}
        (scratch / "config.json").write_text(json.dumps(whole | changes), encoding="utf-8")
        if read_config(scratch).layers != tuple(config.layers[i] for i in kept):
            raise InvalidRecipe(
                f"remove.layers: with layers {', '.join(map(str, kept))} of {self._checkpoint.path.name} alone, some "
                "would become of another kind, because its config.json has kinds follow from positions; remove "
                "channels or heads instead"
            )
        return changes


def _left(what: str, share: float, whole: int, together: int) -> int:
    """Return how many of ``whole`` stay, in multiples of ``together``. Raises ``InvalidRecipe`` for all or none."""
    left = round(whole * (1 - share) / together) * together
    if not 0 < left < whole:
        groups = "groups of heads that share keys and values" if what == "heads" else what
        raise InvalidRecipe(
            f"remove.{what} is {share}, which leaves {left} of {whole} {groups}, {together} being removed at a time; "
            "remove some and leave some"
        )
    return left


def layers_to_keep(similarities: list[float], num_layers: int) -> list[int]:
    """Return the layers, in order, that change what they read most.

    similarities    of each layer, the mean cosine between what it reads and what it leaves: one minus its influence in
                    Men et al., "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect" (2024),
                    arXiv 2403.03853
    """
    return sorted(sorted(range(len(similarities)), key=lambda i: (similarities[i], i))[:num_layers])


def remove_channels(
    checkpoint: Checkpoint, gate_up: Unit, down: Unit, seen: InputStatistics, num_channels: int, layer: CompressedLayer
) -> None:
    """Leave ``num_channels`` of a feed-forward, the same in its up, gate and down projections, in ``layer``.

    A channel matters as much as what it adds to the block's result on calibration tokens: the mean square of what it
    holds, times the square of its column in the down projection. ``seen`` is what that reads.
    """
    wide = checkpoint.read(f"{down.modules[0]}.weight").float()
    importance = seen.hessian.diagonal() * wide.square().sum(0)
    kept = importance.topk(num_channels).indices.sort().values
    _keep_inputs(checkpoint, down, kept, seen, "channels", layer)
    for module, (num_outputs, _) in zip(gate_up.modules, gate_up.shapes, strict=True):
        # Where gate and up are one tensor, the one is below the other.
        rows = torch.cat([kept + start for start in range(0, num_outputs, len(importance))])
        _keep_outputs(checkpoint, module, rows, layer)


def remove_heads(
    checkpoint: Checkpoint, qkv: Unit, o: Unit, seen: InputStatistics, num_groups: int, layer: CompressedLayer
) -> None:
    """Leave ``num_groups`` of an attention's groups of heads that share keys and values, in ``layer``.

    A group matters as much as what it adds to the block's result on calibration tokens, in mean square: that of its
    columns in the output projection times what they read, which is ``seen``.
    """
    config = checkpoint.config
    G, D = config.num_kv_heads, config.head_dim
    width = config.num_heads // G * D
    wide = checkpoint.read(f"{o.modules[0]}.weight").float()
    parts = [slice(g * width, (g + 1) * width) for g in range(G)]
    importance = torch.tensor([product_error(wide[:, part], seen.hessian[part, part]) for part in parts])
    kept = importance.topk(num_groups).indices.sort().values

    def rows(width: int) -> Tensor:
        return (kept.unsqueeze(1) * width + torch.arange(width)).flatten()

    _keep_inputs(checkpoint, o, rows(width), seen, "heads", layer)
    queries, others = rows(width), rows(D)
    if len(qkv.modules) == 1:
        # Queries, keys and values, one below the other.
        all_rows = [torch.cat([queries, others + G * width, others + G * (width + D)])]
    else:
        all_rows = [queries, others, others]
    for module, of_module in zip(qkv.modules, all_rows, strict=True):
        _keep_outputs(checkpoint, module, of_module, layer)


def _keep_inputs(
    checkpoint: Checkpoint, unit: Unit, kept: Tensor, seen: InputStatistics, what: str, layer: CompressedLayer
) -> None:
    """Leave the columns ``kept`` of a unit of one matrix, and report what that changes."""
    name = f"{unit.modules[0]}.weight"
    weight = checkpoint.read(name)
    wide = weight.float()
    layer.changed[name] = weight[:, kept].contiguous()
    left = torch.zeros_like(wide).index_copy_(1, kept, wide[:, kept])
    layer.reports.append(UnitReport(unit.label, what, None, relative_error(left, wide, seen.hessian)))


def _keep_outputs(checkpoint: Checkpoint, module: str, kept: Tensor, layer: CompressedLayer) -> None:
    for part in (f"{module}.weight", f"{module}.bias"):
        if part in checkpoint.names:
            layer.changed[part] = checkpoint.read(part)[kept].contiguous()
