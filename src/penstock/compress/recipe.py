"""What to do with which part of a model, as a YAML file says it; and which of its matrices that means.

    steps:
      - match: decoder            # a component, or a pattern of modules' names
        method: gptq
        bits: 4
        group: 128
      - match: mlp
        layers: 0-1, 5            # of these layers only
        method: rtn
        bits: 8
        group: null
      - match: "*.self_attn.o_proj"
        method: keep

Beside steps, or alone, ``kv_cache: fp8`` finds scales for keys and values. In place of steps, ``remove`` takes parts
out, by how much they matter:

    remove:
      layers: 2                   # so many
      heads: 0.25                 # so large a share of each attention's
      channels: 0.25              # so large a share of each feed-forward's

What a later step says of a matrix counts. Components: ``decoder`` (every layer), ``attention``, ``mlp``,
``embeddings``, ``lm_head``, and of models that see ``vision_encoder`` and ``projector``. A unit's label names just that
unit.
"""

import re
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

import msgspec
import yaml

from penstock.compress.calibration.ranges import Observer, ValueRange
from penstock.compress.methods.sparsity import Sparsity
from penstock.compress.units import Unit
from penstock.errors import InvalidRecipe
from penstock.kernels import InputCodes
from penstock.quant import Scheme

COMPONENTS = ("decoder", "attention", "mlp", "embeddings", "lm_head", "vision_encoder", "projector")
Method = Literal["keep", "rtn", "gptq", "awq", "magnitude", "wanda", "sparsegpt", "svd"]

_RANKS_TOGETHER = 16
"""Ranks are multiples, where they are as large: the vectors that kernels read"""


class Treatment(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a unit is compressed."""

    method: Method
    bits: int = 4
    """2 to 8, of a weight"""
    group: int | None = 128
    """Inputs that share a scale; null: all of an output's"""
    symmetric: bool = True
    """Whether zero is the middle code; if not, each group has a zero of its own, and takes a little more room"""
    act_order: bool = True
    """GPTQ: inputs that matter most go first"""
    damping: float = 0.01
    """GPTQ, SparseGPT and svd: share of the mean second moment added to all. More: steadier with little data"""
    activations: Literal["dynamic", "static"] | None = None
    """Activations are rounded to 8 bits where the model runs: ``dynamic``, with a scale for each token; ``static``,
    with one for all, found on calibration texts"""
    activation_zeros: bool = False
    """Static activations have a zero beside their scale: for those that are not spread evenly around it"""
    observer: Observer = "min-max"
    """What a static scale covers: all that was seen, a ``percentile`` of it, or what leaves the least squared error"""
    percentile: float = 99.99
    """Of values in range, for the observer of that name"""
    smooth: float | None = None
    """SmoothQuant's strength, 0 to 1; null: not smoothed"""
    sparsity: float | None = None
    """Share of the weights that become zero, for magnitude, Wanda and SparseGPT"""
    pattern: str | None = None
    """In its place, ``2:4``: 2 of every 4 inputs stay"""

    size: float | None = None
    """Share of the weights that are left when a unit becomes two matrices of low rank, for svd"""

    def rank(self, unit: Unit) -> int:
        """Return the rank that leaves ``size`` of a unit's weights."""
        assert self.size is not None
        num_outputs = sum(outputs for outputs, _ in unit.shapes)
        rank = int(self.size * unit.num_weights / (num_outputs + unit.num_inputs))
        return max(rank // _RANKS_TOGETHER * _RANKS_TOGETHER or rank, 1)

    @property
    def makes_codes(self) -> bool:
        """Whether weights become codes of few bits."""
        return self.method in ("rtn", "gptq", "awq")

    @property
    def makes_zeros(self) -> bool:
        """Whether some weights become zero, the others staying floats."""
        return self.method in ("magnitude", "wanda", "sparsegpt")

    @property
    def zeros(self) -> Sparsity:
        """Which weights become zero, where some do."""
        found = Sparsity(self.sparsity or 0.0) if self.pattern is None else Sparsity.read_pattern(self.pattern)
        assert found is not None
        return found

    @property
    def scheme(self) -> Scheme:
        """How codes are kept."""
        return Scheme(
            bits=self.bits,
            group=self.group,
            symmetric=self.symmetric,
            activations=self.activations,
            activation_zeros=self.activation_zeros,
        )

    @property
    def needs_statistics(self) -> bool:
        """Whether calibration inputs decide what becomes of weights."""
        return self.method in ("gptq", "awq", "wanda", "sparsegpt", "svd") or self.smooth is not None

    def input_codes(self, seen: ValueRange) -> InputCodes:
        """Return what static activations become."""
        return seen.codes(self.observer, symmetric=not self.activation_zeros, percentile=self.percentile)

    @property
    def needs_ranges(self) -> bool:
        """Whether what the compressed layer's products read is measured."""
        return self.makes_codes and self.activations == "static"


class Step(Treatment, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A treatment and what it is for."""

    match: str | list[str]
    layers: str | int | None = None
    """Numbers and ranges, such as ``0-3, 7``; null: all"""


class Removal(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is taken out of a model, by its importance on calibration texts."""

    layers: int = 0
    """How many; those that change what they read least"""
    heads: float = 0.0
    """Share of each attention's, whole groups that share keys and values; those that add least to its result"""
    channels: float = 0.0
    """Share of each feed-forward's; those that add least to its result"""


class Recipe(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Steps, of which later ones count; or what to remove."""

    steps: list[Step] = []
    remove: Removal | None = None
    kv_cache: Literal["fp8"] | None = None
    """``fp8``: a scale for each layer's keys, and for its values, for engines that cache them in 8-bit floats"""


KEEP = Treatment(method="keep")

NAMED: dict[str, Recipe] = {
    "int8": Recipe(steps=[Step(match="decoder", method="rtn", bits=8, group=None)]),
    "w4a16-gptq": Recipe(steps=[Step(match="decoder", method="gptq")]),
    "w4a16-awq": Recipe(steps=[Step(match="decoder", method="awq", symmetric=False)]),
    "w8a8-smooth": Recipe(
        steps=[Step(match="decoder", method="rtn", bits=8, group=None, activations="dynamic", smooth=0.5)]
    ),
    # Projector and head stay, as what no step names does.
    "vlm-mixed": Recipe(
        steps=[Step(match="vision_encoder", method="rtn", bits=8, group=None), Step(match="decoder", method="gptq")]
    ),
}


def read_recipe(name: str) -> Recipe:
    """Return the recipe called ``name``, or in the YAML file ``name``. Raises ``InvalidRecipe``."""
    if name in NAMED:
        return NAMED[name]
    path = Path(name).expanduser()
    if not path.is_file():
        raise InvalidRecipe(f"there is no recipe {name!r}: give a YAML file or one of {', '.join(NAMED)}")
    try:
        return parse_recipe(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRecipe(f"{path} cannot be read: {error}") from error
    except InvalidRecipe as error:
        raise InvalidRecipe(f"{path}: {error.message}") from error


def parse_recipe(text: str) -> Recipe:
    """Return the recipe that YAML ``text`` says. Raises ``InvalidRecipe``."""
    try:
        recipe = msgspec.convert(yaml.safe_load(text), Recipe)
    except yaml.YAMLError as error:
        raise InvalidRecipe(f"this is not YAML: {' '.join(str(error).split())}") from error
    except msgspec.ValidationError as error:
        raise InvalidRecipe(f"{error}; see the steps that a recipe has in docs/compressing.md") from error
    for number, step in enumerate(recipe.steps, start=1):
        _check(step, f"step {number}")
    _check_removal(recipe)
    return recipe


def format_recipe(recipe: Recipe) -> str:
    """Return the YAML of ``recipe``."""
    text: str = yaml.safe_dump(msgspec.to_builtins(recipe), sort_keys=False, width=120)
    return text


def resolve(recipe: Recipe, units: list[Unit]) -> dict[Unit, Treatment]:
    """Return what each unit gets.

    Raises ``InvalidRecipe`` for a step that matches nothing, or a part of a unit, or layers that are not there.
    """
    num_layers = 1 + max(unit.layer for unit in units if unit.layer is not None)
    resolved = dict.fromkeys(units, KEEP)
    for number, step in enumerate(recipe.steps, start=1):
        layers = None if step.layers is None else _layers(str(step.layers), num_layers, f"step {number}")
        patterns = [step.match] if isinstance(step.match, str) else step.match
        for pattern in patterns:
            chosen = [unit for unit in units if _matches(pattern, unit, f"step {number}")]
            if layers is not None:
                chosen = [unit for unit in chosen if unit.layer in layers]
            if not chosen:
                raise InvalidRecipe(_nothing(f"step {number}", pattern, step, units))
            for unit in chosen:
                _require_runs(step, unit, f"step {number}")
                _require_rounding(step, unit, f"step {number}")
                resolved[unit] = step
    return resolved


def _check_removal(recipe: Recipe) -> None:
    removal = recipe.remove
    if removal is None:
        if not recipe.steps and recipe.kv_cache is None:
            raise InvalidRecipe("there are no steps")
        return
    if recipe.steps or recipe.kv_cache is not None:
        raise InvalidRecipe("remove stands alone: make the smaller model first, then follow the steps with that one")
    if removal.layers < 0:
        raise InvalidRecipe(f"remove.layers is {removal.layers}; it is a number of layers")
    for name, share in (("heads", removal.heads), ("channels", removal.channels)):
        if not 0 <= share < 1:
            raise InvalidRecipe(f"remove.{name} is {share}; it is a share from 0 to below 1")
    if not (removal.layers or removal.heads or removal.channels):
        raise InvalidRecipe("remove takes nothing out: set layers, a number, or heads or channels, a share")


def _check(step: Step, where: str) -> None:
    faults = [
        (not 2 <= step.bits <= 8, f"bits is {step.bits}; it can be 2 to 8"),
        (step.group is not None and step.group < 8, f"group is {step.group}; it is 8 inputs or more, or null for all"),
        (not 0 < step.damping <= 1, f"damping is {step.damping}; it is a share above 0, up to 1"),
        (
            step.smooth is not None and not 0 <= step.smooth <= 1,
            f"smooth is {step.smooth}; it is a strength between 0 and 1",
        ),
        (
            step.activations is not None and (step.bits != 8 or not step.symmetric),
            "activations are rounded beside symmetric weights of 8 bits; set bits: 8",
        ),
        (
            step.activations is not None and step.group is not None,
            "rounded activations need one scale for each output; set group: null",
        ),
        (
            step.activations != "static" and _ranges_of(step) != _ranges_of(KEEP),
            "activation_zeros, observer and percentile are about static activations; set activations: static",
        ),
        (
            not 50 <= step.percentile <= 100,
            f"percentile is {step.percentile}; it is what of 100 values is in range, from 50 to 100",
        ),
        (
            step.percentile != KEEP.percentile and step.observer != "percentile",
            "percentile is the observer's of that name; set observer: percentile",
        ),
        (
            step.makes_zeros and (step.sparsity is None) == (step.pattern is None),
            f"{step.method} takes either sparsity, such as 0.5, or pattern, such as '2:4'",
        ),
        (
            not step.makes_zeros and (step.sparsity is not None or step.pattern is not None),
            f"{step.method} makes no zeros; leave sparsity and pattern out, or take magnitude, wanda or sparsegpt",
        ),
        (
            step.sparsity is not None and not 0 < step.sparsity < 1,
            f"sparsity is {step.sparsity}; it is a share between 0 and 1",
        ),
        (
            step.pattern is not None and Sparsity.read_pattern(step.pattern) is None,
            f"pattern is {step.pattern!r}; it says how many of how many inputs stay, as '2:4' does",
        ),
        (
            (step.method == "svd") is not (step.size is not None),
            "size, such as 0.5, is what svd leaves of the weights; it takes one, and no other method does",
        ),
        (step.size is not None and not 0 < step.size < 1, f"size is {step.size}; it is a share between 0 and 1"),
        (
            (step.makes_zeros or step.method == "svd") and _codes_of(step) != _codes_of(KEEP),
            f"{step.method} leaves floats; leave bits, group, symmetric, activations and smooth out",
        ),
        (step.smooth is not None and step.method == "awq", "AWQ finds scales of its own; leave smooth out"),
    ]
    for is_fault, message in faults:
        if is_fault:
            raise InvalidRecipe(f"{where}: {message}")


def _codes_of(treatment: Treatment) -> tuple[object, ...]:
    """Return what only matters where codes are made."""
    return treatment.bits, treatment.group, treatment.symmetric, treatment.activations, treatment.smooth


def _ranges_of(treatment: Treatment) -> tuple[object, ...]:
    """Return what only matters to static activations."""
    return treatment.activation_zeros, treatment.observer, treatment.percentile


def _require_runs(step: Step, unit: Unit, where: str) -> None:
    """Raise ``InvalidRecipe`` if the step's pattern does not divide the unit's inputs."""
    run = step.zeros.run if step.makes_zeros else None
    if run is not None and unit.num_inputs % run:
        raise InvalidRecipe(
            f"{where}: pattern {step.pattern} needs a multiple of {run} inputs, and {unit.label} has {unit.num_inputs}"
        )


def _require_rounding(step: Step, unit: Unit, where: str) -> None:
    """Raise ``InvalidRecipe`` where calibration would have to see the model's ends, which it passes only once."""
    if unit.layer is None and (step.method not in ("keep", "rtn") or step.smooth is not None or step.activations):
        raise InvalidRecipe(
            f"{where}: {unit.label} is outside of the layers that calibration watches; set method: rtn, without smooth "
            "and activations, or keep"
        )


def _matches(pattern: str, unit: Unit, where: str) -> bool:
    if pattern in COMPONENTS:
        if unit.layer is None:
            return pattern == unit.component or (pattern == "lm_head" and unit.role == "tied")
        return pattern in ("decoder", unit.component)
    if pattern == unit.label:
        return True
    hits = [fnmatchcase(module, pattern) for module in unit.modules]
    if any(hits) and not all(hits):
        raise InvalidRecipe(
            f"{where}: {pattern!r} matches a part of {unit.label}, which runs as one product and is compressed as one; "
            "match all of it, as with a component or a wider pattern"
        )
    return all(hits)


def _layers(text: str, num_layers: int, where: str) -> set[int]:
    chosen: set[int] = set()
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if found is None:
            raise InvalidRecipe(f"{where}: layers is {text!r}; write numbers and ranges, such as 0-3, 7")
        first, last = int(found[1]), int(found[2] or found[1])
        if not first <= last < num_layers:
            raise InvalidRecipe(
                f"{where}: layers {part.strip()} are not there; this model has layers 0-{num_layers - 1}"
            )
        chosen |= set(range(first, last + 1))
    return chosen


def _nothing(where: str, pattern: str, step: Step, units: list[Unit]) -> str:
    among = "" if step.layers is None else f" in layers {step.layers}"
    there = [name for name in COMPONENTS if any(_matches(name, unit, where) for unit in units)]
    return (
        f"{where}: {pattern!r} matches nothing{among}. This model has {', '.join(there)}, and modules such as "
        f"{units[0].modules[0]}"
    )
