"""How far a model's outputs move when one unit alone is compressed, for each unit and treatment.

A unit is compressed as a recipe would compress it, by what it reads in the original model. The layers from there on
then run once for many such changes together: their sequences lie one after another in one stream, the unchanged ones
among them, so that a layer is read once for all. V vocabulary.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate, islice, pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from penstock.compress.calibration.pictures import Pictures, text_follows
from penstock.compress.calibration.statistics import InputStatistics
from penstock.compress.calibration.stream import LayerStream
from penstock.compress.calibration.texts import Texts
from penstock.compress.checkpoint import Checkpoint
from penstock.compress.layer import CompressedLayer, compress_layer
from penstock.compress.recipe import Treatment
from penstock.compress.units import Unit
from penstock.compress.work import WorkDirectory, write_whole
from penstock.kernels import ops_for

CANDIDATES = (
    Treatment(method="rtn", bits=8, group=None),
    Treatment(method="gptq", bits=4),
    Treatment(method="gptq", bits=3, symmetric=False),
    Treatment(method="gptq", bits=2, symmetric=False),
)
"""What a unit may become if it is not kept, fewer bits later. With few codes a group's own zero is worth its bits."""

AT_ONCE = 15
"""Changes that go through the later layers together; the files between layers are so many times as large"""


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """What compressing one unit alone does."""

    unit: str
    bits: int
    kl: float
    """Of the next tokens from the original's, in nats per token, on texts that calibration did not see"""
    weight_error: float
    """Norm of the weight's change over the weight's; costs no calibration"""
    product_error: float
    """The same of its products with calibration inputs, which the Hessian gives without running the model"""


@dataclass(frozen=True, slots=True)
class RankCorrelation:
    """Spearman's coefficients of the cheap errors with the KL: 1 where they put units in the same order."""

    bits: int | None
    """Among units at these bits; None: among all units at all bits"""
    weight_error: float
    product_error: float


def rank_correlations(rows: Sequence[Sensitivity]) -> list[RankCorrelation]:
    """Return the coefficients among all rows, and among those of each number of bits."""

    def among(bits: int | None) -> RankCorrelation:
        chosen = [row for row in rows if bits in (None, row.bits)]
        kl = [row.kl for row in chosen]
        return RankCorrelation(
            bits,
            _spearman([row.weight_error for row in chosen], kl),
            _spearman([row.product_error for row in chosen], kl),
        )

    return [among(None), *(among(bits) for bits in sorted({row.bits for row in rows}, reverse=True))]


@torch.inference_mode()
def measure(
    checkpoint: Checkpoint,
    units: Sequence[Unit],
    calibration: Texts,
    texts: Texts,
    work: WorkDirectory,
    progress: Callable[[str, int, int], None],
) -> list[Sensitivity]:
    """Return a row for each of ``units`` and ``CANDIDATES``; layers that ``work`` has rows of are not measured again.

    ``calibration`` is what units are compressed by, ``texts`` what outputs are compared on, where text follows.
    """
    config, ops = checkpoint.config, ops_for("float32")
    watched, judged = (
        LayerStream(config, checkpoint, one.sequences, ops, pictures=Pictures(checkpoint.path, one.pictures))
        for one in (calibration, texts)
    )
    files = [work.path / f"sensitivity-{index:05}.json" for index in range(config.num_layers)]
    ahead = _Ahead(checkpoint, texts, work.path)
    here, judged_here = work.path / "watched.0", work.path / "judged.0"
    there, judged_there = work.path / "watched.1", work.path / "judged.1"
    last = max((index for index, file in enumerate(files) if not file.is_file()), default=-1)
    if last >= 0:
        watched.embed(here)
        judged.embed(judged_here)
    for index in range(last + 1):
        progress(f"measuring layer {index + 1} of {config.num_layers}", 0, 1)
        if files[index].is_file():
            watched.run_layer(index, here, there)
        else:
            own = [unit for unit in units if unit.layer == index]
            seen = {unit.modules: InputStatistics(unit.num_inputs) for unit in own}

            def observe(
                modules: tuple[str, ...], x: torch.Tensor, seen: dict[tuple[str, ...], InputStatistics] = seen
            ) -> None:
                if modules in seen:
                    seen[modules].add(x)

            watched.run_layer(index, here, there, observe=observe)
            changes = ((unit, candidate) for unit in own for candidate in CANDIDATES)
            rows: list[Sensitivity] = []
            while some := list(islice(changes, AT_ONCE)):
                layers = [compress_layer(checkpoint, {unit: one}, {unit: seen[unit.modules]}) for unit, one in some]
                kls = ahead.kl(judged, index, judged_here, layers)
                rows += [
                    _row(checkpoint, unit, layer, kl) for (unit, _), layer, kl in zip(some, layers, kls, strict=True)
                ]
                progress(f"measuring layer {index + 1} of {config.num_layers}", len(rows), len(own) * len(CANDIDATES))
            write_whole(files[index], json.dumps([asdict(row) for row in rows]).encode())
        judged.run_layer(index, judged_here, judged_there)
        here, there, judged_here, judged_there = there, here, judged_there, judged_here
    return [Sensitivity(**row) for file in files for row in json.loads(file.read_text(encoding="utf-8"))]


class _Ahead:
    """Runs the layers after a changed one, and compares outputs."""

    def __init__(self, checkpoint: Checkpoint, texts: Texts, directory: Path) -> None:
        self._checkpoint = checkpoint
        self._texts = texts
        self._directory = directory

    def kl(self, texts: LayerStream, index: int, source: Path, layers: Sequence[CompressedLayer]) -> list[float]:
        """Return the KL of the model with each of ``layers`` as layer ``index``, whose inputs are ``source``."""
        changed = [self._directory / f"changed-{i}" for i in range(len(layers) + 1)]
        for path, replaced in zip(changed, [{}, *(layer.replaced() for layer in layers)], strict=True):
            texts.run_layer(index, source, path, replaced=replaced)
        # Each sequence's versions are neighbours: the original's outputs are then at hand when the others' are there.
        repeated = self._texts.choose(i for i in range(len(self._texts.sequences)) for _ in changed)
        stream = LayerStream(
            self._checkpoint.config,
            self._checkpoint,
            repeated.sequences,
            ops_for("float32"),
            pictures=Pictures(self._checkpoint.path, repeated.pictures),
        )
        here, there = self._directory / "ahead.0", self._directory / "ahead.1"
        parts = [texts.read(path) for path in changed]
        with here.open("wb") as out:
            for start, end in pairwise([0, *accumulate(map(len, self._texts.sequences))]):
                for part in parts:
                    out.write(np.ascontiguousarray(part[start:end]).tobytes())
        for path in changed:
            path.unlink()
        for later in range(index + 1, self._checkpoint.config.num_layers):
            stream.run_layer(later, here, there)
            here, there = there, here
        return self._compare(stream, here, len(layers))

    def _compare(self, stream: LayerStream, final: Path, num_changes: int) -> list[float]:
        totals, count = [0.0] * num_changes, 0
        outputs = stream.finished(final)
        for _ in self._texts.sequences:
            ids, logits = next(outputs)
            speaks = F.pad(text_follows(ids, self._checkpoint.config.vision), (0, 1), value=True)
            original_TV = logits[speaks].log_softmax(-1)
            for change in range(num_changes):
                _, logits = next(outputs)
                kl = F.kl_div(logits[speaks].log_softmax(-1), original_TV, reduction="sum", log_target=True)
                totals[change] += kl.item()
            count += len(original_TV)
        return [total / count for total in totals]


def _row(checkpoint: Checkpoint, unit: Unit, layer: CompressedLayer, kl: float) -> Sensitivity:
    change, size = 0.0, 0.0
    for name, now in layer.replaced().items():
        weight = checkpoint.read(name).float()
        change += float((now - weight).square().sum())
        size += float(weight.square().sum())
    (report,) = layer.reports
    assert report.error is not None
    assert report.bits is not None, "every candidate is codes"
    return Sensitivity(unit.label, report.bits, kl, (change / size) ** 0.5 if size else 0.0, report.error)


def _spearman(left: Sequence[float], right: Sequence[float]) -> float:
    """Return the correlation of ranks; figures of measurements, which have no ties that matter."""
    if len(left) < 2:
        return float("nan")
    ranks = np.array([np.argsort(np.argsort(values)) for values in (left, right)])
    return float(np.corrcoef(ranks)[0, 1])
