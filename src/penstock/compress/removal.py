"""Taking whole layers and feed-forward channels out of a model, so that a really smaller one is left."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from penstock.compress.calibration.statistics import InputStatistics
from penstock.compress.checkpoint import Checkpoint
from penstock.compress.layer import CompressedLayer, UnitReport, relative_error
from penstock.compress.plan import CoverageRow
from penstock.compress.recipe import Removal
from penstock.compress.units import Unit
from penstock.errors import InvalidRecipe
from penstock.json_objects import read_json_object
from penstock.models import ModelConfig, read_config

_CHANNELS_TOGETHER = 16
"""The number of channels that stay is a multiple: the vectors that kernels read, and no odd shapes"""
_BY_LAYER = ("layer_types", "no_rope_layers")
"""Lists in config.json with a value for each layer"""


@dataclass(frozen=True, slots=True)
class Shape:
    """How large the smaller model is."""

    num_layers: int
    num_channels: int

    @classmethod
    def plan(cls, removal: Removal, config: ModelConfig) -> "Shape":
        """Return what ``removal`` leaves. Raises ``InvalidRecipe`` for what the model does not allow."""
        if removal.layers >= config.num_layers:
            raise InvalidRecipe(
                f"remove.layers is {removal.layers}, and the model has {config.num_layers} layers; leave at least one"
            )
        channels = config.intermediate_size
        if removal.channels:
            if any(layer.experts is not None for layer in config.layers):
                raise InvalidRecipe("remove.channels: this model has experts; only layers can be removed")
            channels = round(channels * (1 - removal.channels) / _CHANNELS_TOGETHER) * _CHANNELS_TOGETHER
            if not 0 < channels < config.intermediate_size:
                raise InvalidRecipe(
                    f"remove.channels is {removal.channels}, which leaves {channels} of {config.intermediate_size} "
                    f"channels, {_CHANNELS_TOGETHER} being removed at a time; remove some and leave some"
                )
        return cls(config.num_layers - removal.layers, channels)

    def cover(self, row: CoverageRow, config: ModelConfig) -> CoverageRow:
        """Return a row of what is kept, as this leaves it. Norms of layers that go are counted as if they stayed."""
        if not row.num_matrices:
            return row
        share, words = self.num_layers / config.num_layers, []
        if share < 1:
            words.append(f"{self.num_layers} of {config.num_layers} layers")
        if row.component == "mlp" and self.num_channels < config.intermediate_size:
            share *= self.num_channels / config.intermediate_size
            words.append(f"{self.num_channels} of {config.intermediate_size} channels")
        return replace(row, treatment=", ".join(words) or row.treatment, bytes_after=round(row.bytes_before * share))


def layers_to_keep(similarities: list[float], num_layers: int) -> list[int]:
    """Return the layers, in order, that change what they read most.

    similarities    of each layer, the mean cosine between what it reads and what it leaves: one minus its influence in
                    Men et al., "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect" (2024),
                    arXiv 2403.03853
    """
    return sorted(sorted(range(len(similarities)), key=lambda i: (similarities[i], i))[:num_layers])


def remove_channels(
    checkpoint: Checkpoint, statistics: Mapping[Unit, InputStatistics], units: list[Unit], num_channels: int
) -> CompressedLayer:
    """Leave ``num_channels`` of a feed-forward, the same in its up, gate and down projections.

    A channel matters as much as what it adds to the block's result on calibration tokens: the mean square of what it
    holds, times the square of its column in the down projection.

    statistics    what the down projection reads
    units         the layer's
    """
    down, gate_up = (next(unit for unit in units if unit.role == role) for role in ("down", "gate_up"))
    seen = statistics[down]
    name = f"{down.modules[0]}.weight"
    weight = checkpoint.read(name)
    wide = weight.float()
    importance = seen.hessian.diagonal() * wide.square().sum(0)
    kept = importance.topk(num_channels).indices.sort().values
    layer = CompressedLayer(changed={name: weight[:, kept].contiguous()})
    for module, (num_outputs, _) in zip(gate_up.modules, gate_up.shapes, strict=True):
        # Where gate and up are one tensor, the one is below the other.
        rows = torch.cat([kept + start for start in range(0, num_outputs, len(importance))])
        for part in (f"{module}.weight", f"{module}.bias"):
            if part in checkpoint.names:
                layer.changed[part] = checkpoint.read(part)[rows].contiguous()
    left = torch.zeros_like(wide).index_copy_(1, kept, wide[:, kept])
    layer.reports.append(UnitReport(down.label, "channels", None, relative_error(left, wide, seen.hessian)))
    return layer


def smaller_config(checkpoint: Checkpoint, kept: list[int], shape: Shape, scratch: Path) -> dict[str, Any]:
    """Return what changes in config.json; ``scratch`` is a directory without one, to try it in.

    Raises ``InvalidRecipe`` where a layer's kind follows from its number, and would change with it.
    """
    config = checkpoint.config
    values = read_json_object(checkpoint.path / "config.json", required=True)
    changes: dict[str, Any] = {"num_hidden_layers": len(kept), "intermediate_size": shape.num_channels}
    if len(kept) < config.num_layers:
        changes |= {name: [values[name][i] for i in kept] for name in _BY_LAYER if values.get(name) is not None}
    (scratch / "config.json").write_text(json.dumps(values | changes), encoding="utf-8")
    layers = tuple(config.layers[i] for i in kept)
    if read_config(scratch).layers != layers:
        raise InvalidRecipe(
            f"remove.layers: with layers {', '.join(map(str, kept))} of {checkpoint.path.name} alone, some would "
            "become of another kind, because its config.json has kinds follow from positions; remove channels instead"
        )
    return changes
