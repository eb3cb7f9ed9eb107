"""Find the recipe for a size, or for a loss: measure every unit, solve the knapsack, and check what comes out.

Losses of units are taken to add up when the knapsack is solved; what is promised, ``max_loss``, is measured on whole
compressed models, on texts that neither calibration nor the measuring of units saw.
"""

import hashlib
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import cycle
from pathlib import Path

import torch

from penstock.compress.auto.knapsack import Knapsack
from penstock.compress.auto.sensitivity import (
    AT_ONCE,
    CANDIDATES,
    RankCorrelation,
    Sensitivity,
    measure,
    rank_correlations,
)
from penstock.compress.calibration.pictures import PictureReader, Pictures
from penstock.compress.calibration.stream import LayerStream
from penstock.compress.calibration.texts import Texts, read_calibration
from penstock.compress.checkpoint import Checkpoint
from penstock.compress.recipe import KEEP, Recipe, Step, Treatment, format_recipe
from penstock.compress.run import Compression, CompressOptions, Progress, full_disk_explained
from penstock.compress.units import Unit, units_of
from penstock.compress.work import WorkDirectory, require_absent, require_room, write_whole
from penstock.errors import CalibrationUnfit, InvalidSetting
from penstock.kernels import ops_for
from penstock.kernels.dtypes import ELEMENT_BYTES
from penstock.models.weights import TensorSource, Weights
from penstock.quant import QuantizedWeight, Scheme, layout_to_write
from penstock.text.chat_template import ChatTemplate
from penstock.text.tokenizer import Tokenizer

CHOICES = (KEEP, *CANDIDATES)
_NUM_JUDGED = 24
"""Sequences apart from those of calibration: a third to measure units by, the others to check models by"""
_NUM_TRIALS = 6
"""Halvings of the range of sizes in search of a loss, each a whole compression: the size is found to a 64th of it"""
_HEADER_BYTES = 100
"""Of a tensor in a file's header, beside its module's name"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """One of the two."""

    target_bytes: int | None = None
    """Of all weights' files, at most"""
    max_loss: float | None = None
    """Share by which perplexity may rise"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A recipe, and what it was chosen by."""

    recipe: Recipe
    sensitivities: list[Sensitivity]
    correlations: list[RankCorrelation]
    planned_bytes: int
    added_kl: float
    """Sum of the KL of all units, which the knapsack made least"""
    rounded_to: int | None
    """Bytes that an item's cost was rounded up to; None: the choice is the best there is"""

    def files(self) -> dict[str, str]:
        """Return what to put beside the weights, by name."""
        values = {name: value for name, value in asdict(self).items() if name != "recipe"}
        return {"recipe.yaml": format_recipe(self.recipe), "sensitivity.json": json.dumps(values, indent=1) + "\n"}


class Search:
    """What recipes can reach on a model, and the way to one."""

    def __init__(self, options: CompressOptions, goal: Goal) -> None:
        """Read all that is small, and refuse what cannot be reached; the recipe of ``options`` is not looked at.

        Raises ``ConfigError``.
        """
        require_absent(options.out)
        self._goal = goal
        self._options = options
        self._checkpoint = checkpoint = Checkpoint(options.model)
        # Every candidate somewhere: what the layout or the texts cannot do is found before any work.
        trial = Compression(replace(options, recipe=_any_recipe(checkpoint)))
        self._plan = trial.plan()
        self.calibration = trial.calibration
        self._units = list(trial.treatments)
        self._costs = self._count_bytes(self._units)
        untouched = sum(item[0] for item in self._costs)
        self._fixed_bytes = checkpoint.num_bytes - untouched
        self.smallest_bytes = self._fixed_bytes + sum(map(min, self._costs))
        self.largest_bytes = self._fixed_bytes + sum(map(max, self._costs))
        self._require_reachable()
        judged = self._judged()
        num_judged = len(judged.sequences)
        third = max(num_judged // 3, 1)
        self._texts, self._checks = judged.choose(range(third)), judged.choose(range(third, num_judged))

    @torch.inference_mode()
    def run(self, progress: Progress = lambda what, done, total: None) -> Found:
        """Measure units and return the recipe; interrupted, it goes on. Raises ``InvalidSetting`` if there is none."""
        plan = self._plan | {"judged": [self._texts.digest, self._checks.digest]}
        # Inputs of two layers, and of the layers after a changed one.
        num_tokens = 2 * self.calibration.num_tokens + (3 * (AT_ONCE + 1) + 2) * self._texts.num_tokens
        require_room(self._options.out, 4 * num_tokens * self._checkpoint.config.hidden_size)
        work = WorkDirectory(self._work_path, plan, restart=self._options.restart)
        with full_disk_explained(work.path):
            return self._run(work, progress)

    def _run(self, work: WorkDirectory, progress: Progress) -> Found:
        rows = measure(self._checkpoint, self._units, self.calibration.texts, self._texts, work, progress)
        kl = {(row.unit, row.bits): row.kl for row in rows}
        losses = [[0.0, *(kl[unit.label, one.bits] for one in CANDIDATES)] for unit in self._units]
        knapsack = Knapsack(self._costs, losses)
        if self._goal.target_bytes is not None:
            choices = knapsack.choose(self._goal.target_bytes - self._fixed_bytes)
        else:
            choices = self._smallest_within(knapsack, work, progress)
        return Found(
            recipe=self._recipe(choices),
            sensitivities=rows,
            correlations=rank_correlations(rows),
            planned_bytes=self._fixed_bytes + knapsack.cost(choices),
            added_kl=sum(item[choice] for item, choice in zip(losses, choices, strict=True)),
            rounded_to=None if knapsack.is_exact else knapsack.step,
        )

    @torch.inference_mode()
    def increase(self, path: Path) -> float:
        """Return the share by which the model at ``path`` has a higher perplexity on texts that nothing else saw."""
        with Weights(path) as weights:
            pass
        return math.exp(self._nats(weights) - self._original_nats) - 1

    def discard(self) -> None:
        """Remove what was kept to go on with."""
        shutil.rmtree(self._directory)

    @property
    def _work_path(self) -> Path:
        return self._options.out.with_name(f"{self._options.out.name}.search")

    @property
    def _directory(self) -> Path:
        return self._work_path.with_name(f"{self._work_path.name}.partial")

    @cached_property
    def _original_nats(self) -> float:
        return self._nats(self._checkpoint)

    def _smallest_within(self, knapsack: Knapsack, work: WorkDirectory, progress: Progress) -> list[int]:
        """Return the choices of the smallest model, to a 64th of the range, whose measured loss is small enough."""
        assert self._goal.max_loss is not None
        low, high = knapsack.smallest, knapsack.largest
        best, least = None, math.inf
        for trial in range(_NUM_TRIALS + 1):
            # The very smallest is tried first.
            budget = low if trial == 0 else (low + high) // 2
            choices = knapsack.choose(budget)
            increase = self._tried(choices, f"trial {trial + 1} of {_NUM_TRIALS + 1}", work, progress)
            least = min(least, increase)
            if increase <= self._goal.max_loss:
                best, high = choices, knapsack.cost(choices)
            else:
                low = budget
            if trial == 0 and best is not None:
                break
        if best is None:
            raise InvalidSetting(
                f"no compressed model was found within a loss of {self._goal.max_loss:.2%}; the nearest lost "
                f"{least:.2%}. Allow that much with --max-loss",
                param="max_loss",
            )
        return best

    def _tried(self, choices: Sequence[int], name: str, work: WorkDirectory, progress: Progress) -> float:
        """Return the measured increase of the whole model made from ``choices``, once for all runs."""
        recipe = self._recipe(choices)
        digest = hashlib.sha256(format_recipe(recipe).encode()).hexdigest()[:16]
        out = work.path / f"trial-{digest}"
        file = out.with_suffix(".json")
        if not file.is_file():
            shutil.rmtree(out, ignore_errors=True)
            options = replace(self._options, recipe=recipe, out=out, restart=False)
            Compression(options).run(lambda what, done, total: progress(f"{name}: {what}", done, total))
            write_whole(file, json.dumps(self.increase(out)).encode())
            shutil.rmtree(out)
        return float(json.loads(file.read_text(encoding="utf-8")))

    def _recipe(self, choices: Sequence[int]) -> Recipe:
        labels: dict[Treatment, list[str]] = {}
        for unit, choice in zip(self._units, choices, strict=True):
            labels.setdefault(CHOICES[choice], []).append(unit.label)
        return Recipe(steps=[_step(one, labels[one]) for one in CANDIDATES if one in labels])

    def _require_reachable(self) -> None:
        target = self._goal.target_bytes
        if target is not None and not self.smallest_bytes <= target < self.largest_bytes:
            raise InvalidSetting(
                f"{target:,} bytes cannot be reached: with all units at {CANDIDATES[-1].bits} bits the weights take "
                f"{self.smallest_bytes:,}, and they are {self.largest_bytes:,} as they are; give a size between",
                param="target_size",
            )

    def _count_bytes(self, units: Sequence[Unit]) -> list[list[int]]:
        """Return the bytes of each unit, headers included, for each of ``CHOICES``."""
        itemsize: int = ELEMENT_BYTES[self._checkpoint.config.dtype]
        packed = _PackedSizes(self._options.layout)
        return [
            [
                unit.num_weights * itemsize,
                *(
                    sum(
                        packed.of(module, shape, one.scheme)
                        for module, shape in zip(unit.modules, unit.shapes, strict=True)
                    )
                    for one in CANDIDATES
                ),
            ]
            for unit in units
        ]

    def _judged(self) -> Texts:
        """Return sequences from the same texts that calibration has not. Raises ``CalibrationUnfit``."""
        options, tokenizer = self._options.calibration, Tokenizer.load(self._options.model)
        taken = set(self.calibration.texts.keys)
        others = read_calibration(
            replace(options, seed=options.seed + 1, num_samples=len(taken) + _NUM_JUDGED),
            tokenizer,
            ChatTemplate.load(self._options.model),
            num_inputs=0,
            see=lambda: PictureReader(self._options.model, self._checkpoint.config, tokenizer),
        ).texts
        judged = others.choose([i for i, key in enumerate(others.keys) if key not in taken][:_NUM_JUDGED])
        if len(judged.sequences) < 2:
            raise CalibrationUnfit(
                f"all texts of {self.calibration.source} are taken to calibrate with, and none are left to judge by; "
                "give more texts, or fewer --samples"
            )
        return judged

    def _nats(self, weights: TensorSource) -> float:
        """Return nats per token on the texts for checks."""
        pictures = Pictures(self._options.model, self._checks.pictures)
        config, sequences = self._checkpoint.config, self._checks.sequences
        stream = LayerStream(config, weights, sequences, ops_for("float32"), pictures=pictures)
        return stream.loss(stream.run_through(self._directory / "check"))


class _PackedSizes:
    """Bytes of matrices as a layout packs them."""

    def __init__(self, layout: str) -> None:
        self._layout = layout_to_write(layout)
        self._known: dict[tuple[tuple[int, int], Scheme], tuple[int, int]] = {}

    def of(self, module: str, shape: tuple[int, int], scheme: Scheme) -> int:
        """Return the bytes of ``module``'s tensors and, at most, of what the header says of them."""
        if (shape, scheme) not in self._known:
            scales = torch.ones(shape[0], scheme.num_groups(shape[1]), dtype=torch.bfloat16)
            codes = torch.full(shape, scheme.middle, dtype=torch.uint8)
            zeros = None if scheme.symmetric else torch.full(scales.shape, scheme.middle, dtype=torch.uint8)
            weight = QuantizedWeight(scheme=scheme, codes=codes, scales=scales, zeros=zeros)
            tensors = self._layout.pack(weight).values()
            self._known[shape, scheme] = sum(tensor.nbytes for tensor in tensors), len(tensors)
        num_bytes, num_tensors = self._known[shape, scheme]
        # The matrix had an entry itself.
        return num_bytes + (num_tensors - 1) * (_HEADER_BYTES + len(module)) + 8


def _any_recipe(checkpoint: Checkpoint) -> Recipe:
    units = [unit for unit in units_of(checkpoint.config) if unit.role != "gate"]
    return Recipe(steps=[_step(one, [unit.label]) for unit, one in zip(units, cycle(CANDIDATES))])


def _step(treatment: Treatment, labels: list[str]) -> Step:
    values: Mapping[str, object] = {name: getattr(treatment, name) for name in treatment.__struct_fields__}
    return Step(match=labels, **values)  # type: ignore[arg-type]
