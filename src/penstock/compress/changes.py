"""What becomes of a model's layers: the matrices of each treated as a recipe says, or parts of the model removed."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from penstock.compress.calibration.statistics import InputStatistics
from penstock.compress.checkpoint import Checkpoint
from penstock.compress.layer import CompressedLayer, compress_layer
from penstock.compress.plan import CoverageRow, cache_row, coverage
from penstock.compress.recipe import Recipe, Treatment, resolve
from penstock.compress.removal import Removing
from penstock.compress.units import Unit, ends_of, seeing_units, units_of
from penstock.errors import InvalidRecipe
from penstock.models import ModelConfig
from penstock.quant import Scheme


class Change(Protocol):
    """A recipe on a model."""

    treatments: dict[Unit, Treatment]
    """Of all units in layers"""
    ends: dict[Unit, Treatment]
    """Of what is in no layer, if it may change: embeddings and head, vision encoder and projector"""
    schemes: dict[str, Scheme]
    """Of modules whose weights become codes"""
    coverage: list[CoverageRow]
    outcome: ModelConfig
    """Of layers as they become, as many as there were"""
    num_layers: int
    """How many stay"""

    def watched(self, index: int) -> list[Unit]:
        """Return the units of a layer whose inputs decide what becomes of it."""

    def make(self, index: int, statistics: Mapping[Unit, InputStatistics]) -> CompressedLayer:
        """Return what becomes of a layer, by the inputs of its watched units."""

    def config_changes(self, kept: list[int], scratch: Path) -> dict[str, Any]:
        """Return what changes in config.json if layers ``kept`` stay; in ``scratch``, which has none, it is tried."""


class Treating:
    """Each unit's treatment; all layers stay."""

    def __init__(self, recipe: Recipe, checkpoint: Checkpoint, units: list[Unit]) -> None:
        """Raise ``InvalidRecipe`` for steps that do not fit the model."""
        self._checkpoint = checkpoint
        # What is no projection, as a matrix that is kept the other way around, is not to be had in codes.
        seeing = [
            unit
            for unit in seeing_units(checkpoint.path, checkpoint.config)
            if all(f"{module}.weight" in checkpoint.names for module in unit.modules)
        ]
        resolved = resolve(recipe, [*units, *ends_of(checkpoint.config), *seeing])
        if recipe.kv_cache is None and all(treatment.method == "keep" for treatment in resolved.values()):
            raise InvalidRecipe("every unit is kept as it is: there is nothing to compress")
        self.treatments = {
            unit: one for unit, one in resolved.items() if unit.layer is not None and unit.role != "gate"
        }
        self.ends = {unit: one for unit, one in resolved.items() if unit.layer is None}
        self.schemes = {
            module: treatment.scheme
            for unit, treatment in (self.treatments | self.ends).items()
            if treatment.makes_codes
            for module in unit.modules
        }
        self.coverage = coverage(checkpoint, self.treatments | self.ends)
        if recipe.kv_cache is not None:
            self.coverage.append(cache_row(checkpoint.config.num_layers))
        self._ranks = {
            unit.modules[0]: treatment.rank(unit)
            for unit, treatment in self.treatments.items()
            if treatment.size is not None
        }
        self.outcome = replace(checkpoint.config, low_rank=self._ranks)
        self.num_layers = checkpoint.config.num_layers

    def watched(self, index: int) -> list[Unit]:
        """See ``Change``."""
        return [unit for unit, one in self.treatments.items() if unit.layer == index and one.needs_statistics]

    def make(self, index: int, statistics: Mapping[Unit, InputStatistics]) -> CompressedLayer:
        """See ``Change``."""
        treatments = {unit: one for unit, one in self.treatments.items() if unit.layer == index}
        return compress_layer(self._checkpoint, treatments, statistics)

    def config_changes(self, kept: list[int], scratch: Path) -> dict[str, Any]:
        """See ``Change``."""
        return {"low_rank": self._ranks} if self._ranks else {}


def change_of(recipe: Recipe, checkpoint: Checkpoint) -> Change:
    """Return what ``recipe`` does. Raises ``InvalidRecipe`` where it does not fit the model."""
    units = units_of(checkpoint.config)
    if recipe.remove is not None:
        return Removing(recipe.remove, checkpoint, [unit for unit in units if unit.role != "gate"])
    return Treating(recipe, checkpoint, units)
