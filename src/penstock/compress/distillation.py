"""A student learns to say what a teacher says, on texts that neither needs to have answers for.

The student's next-token distribution is drawn to the teacher's, both softened by a temperature (Hinton, Vinyals and
Dean, "Distilling the Knowledge in a Neural Network", 2015), and its hidden states to the teacher's at the same share of
the depth, through a learned projection where widths differ (Jiao et al., "TinyBERT: Distilling BERT for Natural
Language Understanding", 2020). Both models run in transformers' code, which autograd goes through.

B sequences, T tokens, V vocabulary, E hidden width.
"""

import json
import random
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

from penstock.compress.calibration.stream import LayerStream
from penstock.compress.calibration.texts import Calibration, CalibrationOptions, read_calibration
from penstock.compress.checkpoint import Checkpoint
from penstock.compress.run import full_disk_explained
from penstock.compress.work import WorkDirectory, require_absent, require_room, save_tensors
from penstock.errors import CalibrationUnfit, InternalError, InvalidSetting, MissingExtra
from penstock.eval.statistics import Estimate, Metric, Table, bootstrap, estimate
from penstock.json_objects import read_json_object
from penstock.kernels import ops_for
from penstock.kernels.dtypes import ELEMENT_BYTES
from penstock.models import read_config
from penstock.models.weights import Weights
from penstock.quant.writing import write_checkpoint
from penstock.registry.provenance import MADE_BY
from penstock.text.chat_template import ChatTemplate
from penstock.text.tokenizer import Tokenizer

NUM_JUDGED = 24
"""Sequences that training does not see"""
_MOST_LOGITS = 1 << 24
"""Of each model at a time: what keeps memory bounded by one long sequence, however many a step has"""
_WARM_SHARE = 0.05
"""Of all steps, in which the rate rises; then it falls to zero"""
SAVE_EVERY_S = 120.0
"""Between two states on disk: as much work a kill costs"""
_LARGEST_DIFFERENCE = 1e-3
"""Of a logit, between what is in memory and what was written, as a share of the largest"""

PERPLEXITY = Metric("perplexity", lambda sums: np.exp(sums[..., 0] / sums[..., 2]), better="lower")
KL = Metric("kl", lambda sums: sums[..., 1] / sums[..., 2], better="lower")

Progress = Callable[[str, int, int], None]
"""Is told what is going on, how much of it is done, and of how much"""


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillOptions:
    """Who learns from whom, and how."""

    student: Path
    """A checkpoint to begin from, such as the teacher with layers removed"""
    teacher: Path
    out: Path
    texts: CalibrationOptions
    """All but some sequences to judge by are learned from, in random order, as often as the steps need them"""
    steps: int = 1000
    batch: int = 8
    """Sequences of a step"""
    rate: float = 5e-4
    """Greatest learning rate, of AdamW"""
    temperature: float = 1.0
    """By which logits are divided. More: unlikely tokens count more"""
    hidden_weight: float = 1.0
    """Of the hidden states' error, a share of the teacher's, beside the divergence in nats; 0: they are not matched"""
    seed: int = 0
    restart: bool = False
    """Discard unfinished work"""


@dataclass(frozen=True, slots=True)
class Distilled:
    """What came of it, on sequences that training did not see; intervals are over sequences."""

    seconds: float
    first_step: int
    """0, or where an interrupted run went on"""
    num_tokens: int
    """Learned from, each as often as it was seen"""
    teacher: Estimate
    """Perplexity"""
    before: Estimate
    after: Estimate
    recovered: Estimate
    """Share of the nats by which the student was behind its teacher that it is behind no more"""
    kl_before: Estimate
    """From the teacher's next tokens, in nats per token"""
    kl_after: Estimate
    largest_difference: float
    """Of any logit, between the model in memory and the written one, as a share of the largest logit"""


class Distillation:
    """A student, a teacher and texts that fit each other."""

    def __init__(self, options: DistillOptions) -> None:
        """Read all that is small, and find what is wrong. Raises ``ConfigError``."""
        if find_spec("transformers") is None:
            raise MissingExtra("distilling trains in transformers' code; pip install 'penstock[transformers]'")
        require_absent(options.out)
        self._options = options
        self._student, self._teacher = Checkpoint(options.student), Checkpoint(options.teacher)
        tokenizer = Tokenizer.load(options.teacher)
        sizes = {checkpoint.config.vocab_size for checkpoint in (self._student, self._teacher)}
        if len(sizes) > 1 or not tokenizer.has_tokens_of(Tokenizer.load(options.student), num_ids=max(sizes)):
            raise InvalidSetting(
                f"{options.student} has another vocabulary than its teacher {options.teacher}; distributions over "
                "different tokens cannot be compared. Make the student from the teacher, as by removing layers",
                param="teacher",
            )
        self.texts: Calibration = read_calibration(
            options.texts, tokenizer, ChatTemplate.load(options.teacher), num_inputs=0
        )
        sequences = self.texts.sequences
        if len(sequences) <= NUM_JUDGED:
            raise CalibrationUnfit(
                f"{self.texts.source} gives {len(sequences)} sequences, and {NUM_JUDGED} are set apart to judge by; "
                "give more texts, or more --samples"
            )
        # The last ones: pieces of a long text are neighbours, and its neighbours are learned from.
        self._learned, self._judged = sequences[:-NUM_JUDGED], sequences[-NUM_JUDGED:]
        student, teacher = (one.num_bytes // _itemsize(one) for one in (self._student, self._teacher))
        self.memory_bytes: int = 4 * (4 * student + teacher) + 6 * 4 * self._most_logits()
        """Weights of both, gradients and AdamW's moments, and logits; activations come on top"""

    def run(self, progress: Progress = lambda what, done, total: None) -> Distilled:
        """Write the student that has learned. Given again after an interruption, it goes on.

        Raises ``NotEnoughDisk``; ``InternalError`` if what was written is not what was made.
        """
        start, options = time.perf_counter(), self._options
        require_room(options.out, 16 * self._student.num_bytes // _itemsize(self._student))
        work = WorkDirectory(options.out, self._plan(), restart=options.restart)
        with full_disk_explained(work.path):
            trainer = _Trainer(options, self._learned)
            first = trainer.resume(work.path)
            trainer.run(work.path, progress)
            num_tokens = trainer.num_tokens(options.steps)
            result = work.path / "result"
            shutil.rmtree(result, ignore_errors=True)
            ids = self._judged[0]
            logits = trainer.write(result, getattr(torch, self._student.config.dtype), ids)
            del trainer
            (result / MADE_BY).write_text(json.dumps(self._made_by(), indent=2) + "\n", encoding="utf-8")
            difference = self._require_written(result, work.path, logits)
            tables = [self._judge(path, work.path, progress) for path in (options.teacher, options.student, result)]
            work.finish(result)
        teacher, before, after = tables
        return Distilled(
            seconds=time.perf_counter() - start,
            first_step=first,
            num_tokens=num_tokens,
            teacher=estimate(teacher, PERPLEXITY),
            before=estimate(before, PERPLEXITY),
            after=estimate(after, PERPLEXITY),
            recovered=bootstrap(tables, _recovered),
            kl_before=estimate(before, KL),
            kl_after=estimate(after, KL),
            largest_difference=difference,
        )

    def _most_logits(self) -> int:
        return max(_MOST_LOGITS, max(map(len, self.texts.sequences)) * self._student.config.vocab_size)

    def _judge(self, path: Path, scratch: Path, progress: Progress) -> Table:
        """Return for each sequence (nats, KL from the teacher, tokens), the model being read as it is served."""
        rows = []
        with Weights(path) as weights, Weights(self._options.teacher) as teacher_weights:
            pass
        ops = ops_for("float32")
        model = LayerStream(read_config(path), weights, self._judged, ops)
        teacher = LayerStream(self._teacher.config, teacher_weights, self._judged, ops)
        with torch.inference_mode():
            streams = [
                stream.finished(stream.run_through(scratch / name))
                for name, stream in (("model", model), ("teacher", teacher))
            ]
            for (ids, logits), (_, wanted) in zip(*streams, strict=True):
                nats = F.cross_entropy(logits[:-1], ids[1:], reduction="sum").item()
                kl = F.kl_div(
                    logits[:-1].log_softmax(-1), wanted[:-1].log_softmax(-1), reduction="sum", log_target=True
                ).item()
                rows.append((nats, kl, len(ids) - 1))
                progress("judging", len(rows), len(self._judged))
        return np.array(rows, dtype=np.float64)

    @torch.inference_mode()
    def _require_written(self, result: Path, scratch: Path, logits: Tensor) -> float:
        """Return how far the written model's ``logits`` [T, V] are off. Raises ``InternalError`` if that is far."""
        with Weights(result) as weights:
            pass
        stream = LayerStream(read_config(result), weights, self._judged[:1], ops_for("float32"))
        ((_, written),) = stream.finished(stream.run_through(scratch / "proof"))
        difference, largest = float((written - logits).abs().max()), float(logits.abs().max())
        if not difference <= _LARGEST_DIFFERENCE * largest:
            raise InternalError(
                f"what was written to {result} gives other logits than what was trained (by {difference:.3g} of "
                f"{largest:.3g}); nothing was put in place"
            )
        return difference / largest

    def _made_by(self) -> dict[str, Any]:
        options = self._options
        return {
            "model": options.student.resolve().name,
            "recipe": {
                "distill": {
                    "teacher": options.teacher.resolve().name,
                    **{name: getattr(options, name) for name in _TRAINING},
                }
            },
            "calibration": {
                "source": self.texts.source,
                "num_tokens": self.texts.num_tokens,
                "sha256": self.texts.digest,
            },
        }

    def _plan(self) -> dict[str, Any]:
        """Return what has to be the same for unfinished work to be gone on with."""
        paths = [self._options.student, self._options.teacher]
        return self._made_by() | {
            "files": {
                str(path.resolve()): {
                    file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in sorted(path.iterdir())
                }
                for path in paths
            }
        }


_TRAINING = ("steps", "batch", "rate", "temperature", "hidden_weight", "seed")


class _Trainer:
    """Both models in float32, and where training is."""

    def __init__(self, options: DistillOptions, sequences: Sequence[Sequence[int]]) -> None:
        self._options = options
        self._sequences = sequences
        self._teacher = _load(options.teacher).requires_grad_(False)
        self._student = _load(options.student)
        self._layers = _matched_layers(self._student, self._teacher) if options.hidden_weight else []
        widths = [_text_config(model).hidden_size for model in (self._student, self._teacher)]
        torch.manual_seed(options.seed)
        self._projections = nn.ModuleList(
            nn.Identity() if widths[0] == widths[1] else nn.Linear(widths[0], widths[1], bias=False)
            for _ in self._layers
        )
        self._parameters = [
            parameter
            for parameter in (*self._student.parameters(), *self._projections.parameters())
            if parameter.requires_grad
        ]
        self._optimizer = torch.optim.AdamW(self._parameters, lr=options.rate, betas=(0.9, 0.95), weight_decay=0.0)
        self._step = 0

    def run(self, directory: Path, progress: Progress) -> None:
        """Take the steps that are left."""
        saved = time.monotonic()
        total = self._options.steps
        while self._step < total:
            loss = self._take_step()
            self._step += 1
            progress(f"learning: {loss:.3f}", self._step, total)
            if time.monotonic() - saved > SAVE_EVERY_S or self._step == total:
                self._save(directory)
                saved = time.monotonic()

    def resume(self, directory: Path) -> int:
        """Go on from the state in ``directory``, if there is one; return the step to go on at."""
        file = directory / _STATE
        if file.is_file():
            with safe_open(file, framework="pt") as state:
                self._step = int(state.get_tensor("step"))
                names = set(state.keys())
                for i, parameter in enumerate(self._parameters):
                    if f"{i}.parameter" not in names:
                        continue
                    parameter.data.copy_(state.get_tensor(f"{i}.parameter"))
                    self._optimizer.state[parameter] = {
                        "step": torch.tensor(float(self._step)),
                        **{name: state.get_tensor(f"{i}.{name}") for name in _MOMENTS},
                    }
        return self._step

    def num_tokens(self, steps: int) -> int:
        """Return the tokens of so many steps."""
        return sum(len(self._sequences[i]) for step in range(steps) for i in self._drawn(step))

    @torch.no_grad()
    def write(self, directory: Path, dtype: torch.dtype, ids: Sequence[int]) -> Tensor:
        """Round the student to ``dtype``, write it beside what its checkpoint has, and return its logits [T, V]."""
        for parameter in self._student.parameters():
            parameter.copy_(parameter.to(dtype))
        logits: Tensor = self._student(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float()
        saved = directory.with_name("saved")
        shutil.rmtree(saved, ignore_errors=True)
        self._student.to(dtype).save_pretrained(saved)
        with Weights(saved) as weights:
            write_checkpoint(directory, self._options.student, ((name, weights.read(name)) for name in sorted(weights)))
        shutil.rmtree(saved)
        return logits

    def _save(self, directory: Path) -> None:
        state = {"step": torch.tensor(self._step)}
        for i, parameter in enumerate(self._parameters):
            moments = self._optimizer.state.get(parameter)
            # What no text reaches, as what sees, stays as it is.
            if moments is not None:
                state[f"{i}.parameter"] = parameter.data
                state |= {f"{i}.{name}": moments[name] for name in _MOMENTS}
        save_tensors(directory / _STATE, state)

    def _drawn(self, step: int) -> list[int]:
        """Return which sequences a step learns from, which depends on nothing but seed and step."""
        draw = random.Random(f"{self._options.seed} {step}")
        return draw.choices(range(len(self._sequences)), k=self._options.batch)

    def _take_step(self) -> float:
        """Return the loss before it."""
        drawn = [self._sequences[i] for i in self._drawn(self._step)]
        num_tokens, total = sum(map(len, drawn)), 0.0
        for ids_BT in self._together(drawn):
            loss = self._loss(ids_BT) * (ids_BT.numel() / num_tokens)
            torch.autograd.backward(loss)
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(self._parameters, 1.0)
        share = (self._step + 1) / self._options.steps
        for group in self._optimizer.param_groups:
            group["lr"] = self._options.rate * min(share / _WARM_SHARE, (1 - share) / (1 - _WARM_SHARE))
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return total

    def _together(self, sequences: Sequence[Sequence[int]]) -> Iterator[Tensor]:
        """Yield ids [B, T] of sequences that are as long, as many as logits are bounded by, one at least."""
        vocab_size = _text_config(self._student).vocab_size
        for length, group in groupby(sorted(sequences, key=len), key=len):
            alike = list(group)
            most = max(_MOST_LOGITS // (length * vocab_size), 1)
            for start in range(0, len(alike), most):
                yield torch.tensor(alike[start : start + most])

    def _loss(self, ids_BT: Tensor) -> Tensor:
        """Return nats per token by which the student's distributions differ, and what its hidden states add."""
        wants_hidden, temperature = bool(self._layers), self._options.temperature
        with torch.no_grad():
            wanted = self._teacher(input_ids=ids_BT, output_hidden_states=wants_hidden, use_cache=False)
            target = (wanted.logits.float() / temperature).log_softmax(-1)
        made = self._student(input_ids=ids_BT, output_hidden_states=wants_hidden, use_cache=False)
        logits = (made.logits.float() / temperature).log_softmax(-1)
        # A softer distribution has weaker gradients, by the temperature's square.
        loss = F.kl_div(logits, target, reduction="sum", log_target=True) * (temperature**2 / ids_BT.numel())
        for (own, others), projection in zip(self._layers, self._projections, strict=True):
            teacher = wanted.hidden_states[others].float()
            error = (projection(made.hidden_states[own].float()) - teacher).square().sum() / teacher.square().sum()
            loss = loss + error * (self._options.hidden_weight / len(self._layers))
        return loss


_STATE = "state.safetensors"
_MOMENTS = ("exp_avg", "exp_avg_sq")


def _load(path: Path) -> Any:
    """Return the model in ``path`` as transformers has it, in float32."""
    # Optional, and slow to import.
    import transformers

    transformers.utils.logging.disable_progress_bar()
    (architecture, *_) = read_json_object(path / "config.json", required=True)["architectures"]
    model = getattr(transformers, architecture).from_pretrained(
        path, dtype=torch.float32, local_files_only=True, use_safetensors=True, attn_implementation="sdpa"
    )
    return model.eval()


def _text_config(model: Any) -> Any:
    return model.config.get_text_config()


def _matched_layers(student: Any, teacher: Any) -> list[tuple[int, int]]:
    """Return for each of the student's layers which of the teacher's is as deep, the last being the last."""
    own, others = (_text_config(model).num_hidden_layers for model in (student, teacher))
    return [(i, round(i * others / own)) for i in range(1, own + 1)]


def _recovered(sums: list[Table]) -> Table:
    teacher, before, after = (nats[..., 0] / nats[..., 2] for nats in sums)
    return np.asarray((before - after) / (before - teacher))


def _itemsize(checkpoint: Checkpoint) -> int:
    return ELEMENT_BYTES[checkpoint.config.dtype]
