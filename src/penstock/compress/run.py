"""Compress a model layer by layer, into a directory beside its destination, and prove what came out.

V vocabulary.
"""

import errno
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import msgspec
import torch
import torch.nn.functional as F
from safetensors import SafetensorError

from penstock import __version__
from penstock.compress.calibration.cache import CacheRange
from penstock.compress.calibration.pictures import PictureReader, Pictures
from penstock.compress.calibration.ranges import ValueRange
from penstock.compress.calibration.statistics import InputStatistics
from penstock.compress.calibration.stream import BATCH_TOKENS, LayerStream
from penstock.compress.calibration.texts import Calibration, CalibrationOptions, read_calibration, require_likely
from penstock.compress.changes import Change, change_of
from penstock.compress.checkpoint import Checkpoint
from penstock.compress.ends import WithEnds, compress_ends
from penstock.compress.layer import UnitReport
from penstock.compress.output import tensors_of, write_model
from penstock.compress.plan import MOST_LOGITS, CoverageRow, Estimate, estimate
from penstock.compress.recipe import Recipe
from penstock.compress.removal import layers_to_keep
from penstock.compress.units import Observer, Unit
from penstock.compress.work import (
    WorkDirectory,
    ends_file,
    keep,
    reported,
    require_room,
    save_finished,
    unfinished,
    write_whole,
)
from penstock.errors import InternalError, InvalidSetting, NotEnoughDisk
from penstock.kernels import InputCodes, ops_for
from penstock.models import read_config
from penstock.models.weights import Weights
from penstock.quant import QuantizedWeight, layout_to_write
from penstock.registry.provenance import MADE_BY
from penstock.text.chat_template import ChatTemplate
from penstock.text.tokenizer import Tokenizer

_NUM_PROBES = 4
"""Sequences with which texts are judged before, and the result after"""
_LARGEST_DIFFERENCE = 1e-3
"""Of a logit, between what is in memory and what was written, as a share of the largest"""
_SLACK = 1.01
_HEADER_BYTES = 2048
"""Of a unit's tensors in a file's header, at most"""

Progress = Callable[[str, int, int], None]
"""Is told what is going on, how many tokens of it are done, and of how many"""


@dataclass(frozen=True, slots=True, kw_only=True)
class CompressOptions:
    """What to make of which model."""

    model: Path
    out: Path
    recipe: Recipe
    layout: str = "compressed-tensors"
    """One of ``quant.layouts.LAYOUTS``"""
    calibration: CalibrationOptions
    restart: bool = False
    """Discard unfinished work"""
    beside: Mapping[str, str] = field(default_factory=dict)
    """Texts to put beside the weights, by file name"""


@dataclass(frozen=True, slots=True)
class Report:
    """What came out."""

    units: list[UnitReport]
    seconds: float
    bytes_before: int
    bytes_after: int
    first_layer: int
    """0, or where an interrupted run went on"""
    calibration_loss: float
    """Nats per token of the model as it was, on a few of the calibration texts"""
    kl: float
    """Of the compressed model's next tokens from the original's on these texts, in nats per token"""
    largest_difference: float
    """Of any logit, between the model in memory and the written one, as a share of the largest logit"""


class Compression:
    """A recipe resolved on a model, ready to be run."""

    def __init__(self, options: CompressOptions) -> None:
        """Read all that is small, and find what is wrong. Raises ``ConfigError``."""
        self._options = options
        self._checkpoint = checkpoint = Checkpoint(options.model)
        self._change = change_of(options.recipe, checkpoint)
        self.treatments = self._change.treatments
        if self._change.schemes:
            _require_layout(options.layout, self._change)
        if options.recipe.kv_cache is not None and options.layout != "compressed-tensors":
            raise InvalidSetting(
                f"{options.layout} has no scales of keys and values; write compressed-tensors instead", param="layout"
            )
        tokenizer = Tokenizer.load(options.model)
        self.calibration: Calibration = read_calibration(
            options.calibration,
            tokenizer,
            ChatTemplate.load(options.model),
            num_inputs=max(unit.num_inputs for unit in self.treatments),
            see=lambda: PictureReader(options.model, checkpoint.config, tokenizer),
        )
        sequences = self.calibration.sequences
        num_layers = checkpoint.config.num_layers
        if not (
            any(self._change.watched(index) for index in range(num_layers))
            or any(treatment.needs_ranges for treatment in self.treatments.values())
            or self._change.num_layers < num_layers
            or options.recipe.kv_cache is not None
        ):
            sequences = sequences[:_NUM_PROBES]
        self._ops = ops_for("float32")
        ends = {module: self._change.schemes[module] for module in _coded_ends(self._change)}
        weights = WithEnds(checkpoint, ends_file(options.out), ends) if ends else checkpoint
        self._pictures = Pictures(options.model, self.calibration.texts.pictures)
        self._stream = LayerStream(checkpoint.config, weights, sequences, self._ops, pictures=self._pictures)
        self._outcome = LayerStream(self._change.outcome, weights, sequences, self._ops, pictures=self._pictures)
        self._probes = sequences[:_NUM_PROBES]
        self.coverage: list[CoverageRow] = self._change.coverage
        self._planned_bytes = sum(row.bytes_after for row in self.coverage)
        self.estimate: Estimate = estimate(
            checkpoint,
            self.treatments,
            list(map(len, sequences)),
            sum(map(len, self._probes)),
            BATCH_TOKENS,
            self._planned_bytes,
        )

    @torch.inference_mode()
    def run(self, progress: Progress = lambda what, done, total: None) -> Report:
        """Write the model and return what came out.

        Raises ``CalibrationUnfit``; ``NotEnoughDisk``, after which the same call goes on; ``InvalidSetting`` if
        something is in the way; ``InternalError`` if what was written is not what was made.
        """
        start = time.perf_counter()
        require_room(self._options.out, self.estimate.disk_bytes)
        work = WorkDirectory(self._options.out, self.plan(), restart=self._options.restart)
        with full_disk_explained(work.path):
            loss, before = self._probe(work, progress)
            kept = self._choose_layers(work, progress)
            changes = self._change.config_changes(kept, work.path)
            self._finish_ends(work)
            first = self._run_layers(work, kept, progress)
            result = work.path / "result"
            shutil.rmtree(result, ignore_errors=True)
            layers = {i: work.layer(i) for i in kept}
            write_model(
                result,
                self._checkpoint,
                layers,
                work.ends,
                self._change.schemes,
                self._options.layout,
                changes,
                cache_scales=self._options.recipe.kv_cache is not None,
            )
            (result / MADE_BY).write_text(json.dumps(self._made_by(), indent=2) + "\n", encoding="utf-8")
            for name, text in self._options.beside.items():
                (result / name).write_text(text, encoding="utf-8")
            bytes_after = self._require_planned_size(result)
            kl, difference = self._prove(work, result, before, progress)
            files = [work.ends, *map(work.layer, range(self._checkpoint.config.num_layers))]
            reports = [UnitReport(**unit) for file in files for unit in reported(file)]
            work.finish(result)
        return Report(
            units=reports,
            seconds=time.perf_counter() - start,
            bytes_before=self._checkpoint.num_bytes,
            bytes_after=bytes_after,
            first_layer=first,
            calibration_loss=loss,
            kl=kl,
            largest_difference=difference,
        )

    def _probe(self, work: WorkDirectory, progress: Progress) -> tuple[float, Path]:
        """Return the model's loss on a few sequences as it is, and what its last layer leaves of them.

        Raises ``CalibrationUnfit``.
        """
        stream = self._probe_stream()
        final = stream.run_through(work.path / "probe", partial(progress, "reading the texts"))
        loss = stream.loss(final)
        require_likely(loss, self.calibration, self._options.calibration)
        return loss, final

    def _probe_stream(self) -> LayerStream:
        return LayerStream(self._checkpoint.config, self._checkpoint, self._probes, self._ops, pictures=self._pictures)

    def _choose_layers(self, work: WorkDirectory, progress: Progress) -> list[int]:
        """Return the layers that stay, having measured them where some go."""
        num_layers = self._checkpoint.config.num_layers
        if self._change.num_layers == num_layers:
            return list(range(num_layers))
        measured = work.path / "similarities.json"
        if not measured.is_file():
            found: list[float] = []
            self._stream.run_through(
                work.path / "measured",
                partial(progress, "measuring layers"),
                lambda before, after: found.append(self._stream.similarity(before, after)),
            ).unlink()
            write_whole(measured, json.dumps(found).encode())
        return layers_to_keep(json.loads(measured.read_text(encoding="utf-8")), self._change.num_layers)

    def _finish_ends(self, work: WorkDirectory) -> None:
        if not work.ends.is_file():
            ends = compress_ends(self._checkpoint, self._change.ends)
            save_finished(work.ends, tensors_of(ends), [asdict(report) for report in ends.reports])

    def _run_layers(self, work: WorkDirectory, kept: list[int], progress: Progress) -> int:
        """Compress the layers that are not done, and return the first of them."""
        num_layers, stream = self._checkpoint.config.num_layers, self._stream
        first = work.first_unfinished(num_layers)
        if first == 0:
            stream.embed(unfinished(work.hidden(0)))
            keep(work.hidden(0))
        for index in range(first, num_layers):
            if index in kept:
                self._run_layer(work, index, progress)
            else:
                shutil.copyfile(work.hidden(index), unfinished(work.hidden(index + 1)))
                keep(work.hidden(index + 1))
                save_finished(work.layer(index), {}, [])
                work.hidden(index).unlink()
        return first

    def _run_layer(self, work: WorkDirectory, index: int, progress: Progress) -> None:
        stream, num_layers = self._stream, self._checkpoint.config.num_layers
        statistics = {unit: InputStatistics(unit.num_inputs) for unit in self._change.watched(index)}
        name = f"layer {index + 1} of {num_layers}"
        counted = _counted(progress, f"{name}: watching", stream.num_tokens)
        if statistics:
            stream.run_layer(index, work.hidden(index), None, observe=_adding_to(statistics), progress=counted)
        progress(f"{name}: compressing", 0, 1)
        layer = self._change.make(index, statistics)
        counted = _counted(progress, f"{name}: running", stream.num_tokens)
        target = work.hidden(index + 1)
        # What the compressed layer reads, scales that moved between weights included.
        ranges = {
            unit: ValueRange() for unit, one in self.treatments.items() if unit.layer == index and one.needs_ranges
        }
        cache = CacheRange()
        self._outcome.run_layer(
            index,
            work.hidden(index),
            unfinished(target),
            replaced=layer.replaced(),
            observe=_adding_to(ranges),
            observe_cache=None if self._options.recipe.kv_cache is None else cache.add,
            progress=counted,
        )
        for unit, seen in ranges.items():
            layer.inputs |= dict.fromkeys(unit.modules, self.treatments[unit].input_codes(seen))
        if self._options.recipe.kv_cache is not None:
            layer.changed |= cache.tensors(index)
        keep(target)
        save_finished(work.layer(index), tensors_of(layer), [asdict(report) for report in layer.reports])
        work.hidden(index).unlink()

    def _prove(self, work: WorkDirectory, result: Path, before: Path, progress: Progress) -> tuple[float, float]:
        """Return the KL from the model as it was, and how far the written one is from the one in memory.

        Raises ``InternalError`` if that is more than rounding.
        """
        config = self._checkpoint.config
        with Weights(result) as reopened:
            pass
        stream_of = partial(
            LayerStream, read_config(result), reopened, self._probes, self._ops, pictures=self._pictures
        )
        streams = [stream_of()]
        if any(treatment.activations is not None for treatment in self.treatments.values()):
            # What is measured is what will be served; codes as floats are what was made.
            streams.append(stream_of(as_served=True))
        reading = partial(progress, "reading it back")
        ours = self._last_logits(self._stream, work.hidden(config.num_layers))
        written = [
            self._last_logits(one, one.run_through(work.path / f"proof-{i}", reading)) for i, one in enumerate(streams)
        ]
        originals = self._last_logits(self._probe_stream(), before)
        kl, largest, difference, count = 0.0, 0.0, 0.0, 0
        for made, read, served, meant in zip(ours, written[0], written[-1], originals, strict=True):
            difference = max(difference, float((made - read).abs().max()))
            largest = max(largest, float(made.abs().max()))
            log_probs = served.log_softmax(-1), meant.log_softmax(-1)
            kl += F.kl_div(*log_probs, reduction="sum", log_target=True).item()
            count += len(made)
        if not difference <= _LARGEST_DIFFERENCE * largest:
            raise InternalError(
                f"what was written to {result} gives other logits than what was made (by {difference:.3g} of "
                f"{largest:.3g}); nothing was put in place"
            )
        return kl / count, difference / largest

    def _last_logits(self, stream: LayerStream, final: Path) -> list[torch.Tensor]:
        """Return the logits of each probe's last positions, as many as memory is spent on."""
        rows = max(MOST_LOGITS // (len(self._probes) * self._checkpoint.config.vocab_size), 1)
        return [logits for _, logits in islice(stream.finished(final, most=rows), len(self._probes))]

    def _require_planned_size(self, result: Path) -> int:
        """Return the bytes that the weights take. Raises ``InternalError`` if they are more than planned."""
        num_bytes = sum(file.stat().st_size for file in result.glob("*.safetensors"))
        if num_bytes > self._planned_bytes * _SLACK + _HEADER_BYTES * len(self.treatments):
            raise InternalError(
                f"{result} takes {num_bytes} bytes, and {self._planned_bytes} were planned; nothing was put in place"
            )
        return num_bytes

    def _made_by(self) -> dict[str, Any]:
        """Return what whoever has the result may want to know of how it came about."""
        calibration = self.calibration
        return {
            "penstock": __version__,
            "model": self._checkpoint.path.resolve().name,
            "recipe": msgspec.to_builtins(self._options.recipe),
            "layout": self._options.layout,
            "calibration": {
                "source": calibration.source,
                "num_tokens": calibration.num_tokens,
                "sha256": calibration.digest,
            },
        }

    def plan(self) -> dict[str, Any]:
        """Return what has to be the same for unfinished work to be gone on with."""
        checkpoint = self._checkpoint
        stats = {file.name: file.stat() for file in sorted(checkpoint.path.iterdir())}
        return {
            "model": str(checkpoint.path.resolve()),
            "files": {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()},
            "recipe": msgspec.to_builtins(self._options.recipe),
            "calibration": self.calibration.digest,
        }


def _coded_ends(change: Change) -> list[str]:
    """Return the modules in no layer that become codes."""
    return [module for unit, one in change.ends.items() if one.makes_codes for module in unit.modules]


def _require_layout(name: str, change: Change) -> None:
    """Raise ``InvalidSetting`` if the layout ``name`` cannot say what units become."""
    layout = layout_to_write(name)
    layout.describe(change.schemes, [])
    if name != "compressed-tensors" and _coded_ends(change):
        raise InvalidSetting(
            f"{name} has no embeddings or head in codes that others would read; write compressed-tensors instead",
            param="layout",
        )
    kinds = {
        (treatment.scheme, shape)
        for unit, treatment in (change.treatments | change.ends).items()
        if treatment.makes_codes
        for shape in unit.shapes
    }
    for scheme, shape in kinds:
        codes = torch.full(shape, scheme.middle, dtype=torch.uint8)
        scales = torch.ones(shape[0], scheme.num_groups(shape[1]), dtype=torch.bfloat16)
        zeros = None if scheme.symmetric else torch.full(scales.shape, scheme.middle, dtype=torch.uint8)
        inputs = InputCodes(1.0) if scheme.activations == "static" else None
        layout.pack(QuantizedWeight(scheme=scheme, codes=codes, scales=scales, zeros=zeros, inputs=inputs))


class _Accumulator(Protocol):
    def add(self, x: torch.Tensor) -> None: ...


def _adding_to(seen: Mapping[Unit, _Accumulator]) -> Observer:
    """Return what adds the inputs of these units."""
    by_modules = {unit.modules: one for unit, one in seen.items()}

    def observe(modules: tuple[str, ...], x: torch.Tensor) -> None:
        if modules in by_modules:
            by_modules[modules].add(x)

    return observe


def _counted(progress: Progress, what: str, total: int) -> Callable[[int], None]:
    """Return what adds up tokens for ``progress``."""
    done = 0

    def add(num_tokens: int) -> None:
        nonlocal done
        done += num_tokens
        progress(what, done, total)

    return add


@contextmanager
def full_disk_explained(path: Path) -> Iterator[None]:
    """Turn what libraries raise on a full disk into ``NotEnoughDisk``."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        is_full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if not is_full and "os error 28" not in str(error):
            raise
        raise NotEnoughDisk(
            f"the disk is full; layers that are done are kept in {path}: free some room and give the same command "
            "again, or remove that directory"
        ) from error
