"""Teach penstock-mini to see: `python -m training.see --minutes 48 --language runs/mini --out runs/sees`.

Two parts of one run. While it looks, tower and projector learn from classifiers alone (`looking.py`). Then it is asked:
the decoder reads the projected drawing and learns the answers, at a small rate, held to its former self on text.
"""

import argparse
import copy
import json
import random
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from penstock.eval.sets.drawings import ANSWERS, Drawing, draw
from training.evaluate import exact_by_kind, mean_loss, padded
from training.export import load_run
from training.looking import Classifiers, answer_labels, patch_labels
from training.muon import Muon
from training.seeing import SeeingModel, TowerConfig, pixels_of
from training.tokenizer import ChatEncoder
from training.train import Data, read_checkpoint, read_corpus, replace_checkpoint


@dataclass(frozen=True, kw_only=True, slots=True)
class SeeConfig:
    """How the run is made; the defaults made the shipped model."""

    seed: int = 1
    look_share: float = 0.2
    """Part of the budget in which only tower and projector learn, from classifiers."""
    workers: int = 2
    """Threads that each take a part of a step on one core. Two cores under one product lose more by waiting for each
    other: 64 drawings took 4 s that way on a busy machine and 0.6 s on one core."""
    look_batch: int = 64
    """Drawings a step while it looks."""
    asked_look_batch: int = 48
    """Drawings a step once the decoder is asked; the classifiers see all of them."""
    ask_batch: int = 16
    """Drawings of these that the decoder is asked about. Up: steadier steps, fewer of them in the same time."""
    most_turns: int = 3
    """Questions about a drawing in one chat. Up: more answers for a drawing, fewer of them first ones."""
    classifier_weight: float = 0.3
    """Of the classifiers' loss once the decoder is asked."""
    text_rows: int = 1
    """Rows of text a step and worker. Up: text stays closer to what it was, fewer drawings in the same time."""
    text_length: int = 128
    text_weight: float = 1.0
    """Of the divergence from the former self beside the answers' loss."""
    matrix_rate: float = 6e-3
    """Peak rate of Muon, for the tower's matrices."""
    other_rate: float = 2e-3
    """Peak rate of AdamW, for the tower's other parameters and the classifiers."""
    language_rate: float = 4e-4
    """Peak rate of AdamW, for the decoder's matrices; its embedding and norms stay."""
    weight_decay: float = 0.02
    warmup_steps: int = 40
    decay_fraction: float = 0.45
    """Last part of the budget over which every rate falls to zero."""


def chat_rows(
    drawings: list[Drawing], encoder: ChatEncoder, num_patches: int, most_turns: int, draws: random.Random
) -> tuple[Tensor, Tensor]:
    """A chat about each drawing: ids [B, T] with the image's placeholders, and which of them are answers [B, T]."""
    chats = []
    for drawing in drawings:
        asked = draws.sample(drawing.questions, min(most_turns, len(drawing.questions)))
        ids: list[int] = []
        mask: list[bool] = []
        for i, one in enumerate(asked):
            turn, learned = encoder.exchange(one.text, one.answer, num_patches if i == 0 else 0)
            ids.extend(turn)
            mask.extend(learned)
        chats.append((ids, mask))
    return padded(chats)


class SeeTrainer:
    """One run: model, classifiers, optimizers and directory."""

    def __init__(self, out: Path, text: Data, model: SeeingModel, config: SeeConfig) -> None:
        self.out = out
        self.text = text
        self.encoder = text.encoder
        self.model = model
        self.config = config
        self.former = copy.deepcopy(model.language_model).requires_grad_(False)
        self.classifiers = Classifiers(model.language_model.config.hidden_size)
        self.optimizers = self._make_optimizers()
        self.step = 0
        self.num_drawings = 0
        self.elapsed_s = 0.0
        self._workers = ThreadPoolExecutor(config.workers)

    def _make_optimizers(self) -> list[torch.optim.Optimizer]:
        config = self.config
        new = self.model.new_parameters()
        matrices = [p for name, p in new if p.ndim == 2 and "position" not in name]
        others = [p for name, p in new if p.ndim != 2 or "position" in name]
        old = self.model.language_model.named_parameters()
        language = [p for name, p in old if p.ndim == 2 and "embed" not in name]
        self.taught = [*matrices, *others, *language, *self.classifiers.parameters()]
        muon = Muon(matrices, lr=config.matrix_rate, weight_decay=config.weight_decay)
        adamw = torch.optim.AdamW(
            [{"params": others}, {"params": list(self.classifiers.parameters())}],
            lr=config.other_rate,
            betas=(0.9, 0.95),
            weight_decay=0.0,
        )
        decoder = torch.optim.AdamW(language, lr=config.language_rate, betas=(0.9, 0.95), weight_decay=0.0)
        for optimizer in (muon, adamw, decoder):
            for group in optimizer.param_groups:
                group["peak_rate"] = group["lr"]
        return [muon, adamw, decoder]

    def train_step(self, progress: float) -> dict[str, float]:
        """Take one step; returns its losses by name."""
        config = self.config
        asks = progress >= config.look_share
        size = (config.asked_look_batch if asks else config.look_batch) // config.workers
        firsts = range(self.num_drawings, self.num_drawings + size * config.workers, size)
        found = list(self._workers.map(lambda first: self._gradients(first, size, asks), firsts))
        self.step += 1
        self.num_drawings = firsts.stop
        for parameter, *gradients in zip(self.taught, *(gradients for gradients, _ in found), strict=True):
            known = [gradient for gradient in gradients if gradient is not None]
            parameter.grad = sum(known[1:], start=known[0]) / config.workers if known else None
        torch.nn.utils.clip_grad_norm_(self.taught, 1.0)
        warm = min(1.0, self.step / config.warmup_steps)
        factor = warm * min(1.0, (1.0 - progress) / config.decay_fraction)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_rate"] * factor
            optimizer.step()
        return {name: sum(losses[name] for _, losses in found) / len(found) for name in found[0][1]}

    def _gradients(self, first: int, size: int, asks: bool) -> tuple[tuple[Tensor | None, ...], dict[str, float]]:
        """One worker's part of a step: the gradients of its drawings' mean losses, and these by name."""
        config = self.config
        drawings = [draw("training", number) for number in range(first, first + size)]
        tower = self.model.config
        embeddings_BPE = self.model.embeddings(pixels_of([one.image for one in drawings], tower.image_size))
        of_patches = patch_labels(drawings, tower.image_size // tower.patch_size)
        losses = {"look": self.classifiers.loss(embeddings_BPE, of_patches, answer_labels(drawings))}
        total = losses["look"] * (config.classifier_weight if asks else 1.0)
        if asks:
            num_asked = config.ask_batch // config.workers
            losses["ask"] = self._answer_loss(drawings[:num_asked], embeddings_BPE[:num_asked], first)
            losses["text"] = self._text_loss(first)
            total = total + losses["ask"] + config.text_weight * losses["text"]
        gradients = torch.autograd.grad(total, self.taught, allow_unused=True)
        return gradients, {name: loss.item() for name, loss in losses.items()}

    def _answer_loss(self, drawings: list[Drawing], embeddings_BPE: Tensor, seed: int) -> Tensor:
        draws = random.Random(f"{self.config.seed} chats {seed}")
        ids, learned = chat_rows(drawings, self.encoder, embeddings_BPE.shape[1], self.config.most_turns, draws)
        hidden = self.model.hidden(ids[:, :-1], self.encoder.image_id, embeddings_BPE)
        wanted = learned[:, 1:]
        return F.cross_entropy(self.model.language_model.logits(hidden[wanted]), ids[:, 1:][wanted])

    def _text_loss(self, seed: int) -> Tensor:
        """Divergence from the decoder as it was, in nats per token, on rows of its own training text."""
        rng = np.random.default_rng((self.config.seed, seed))
        ids, _ = self.text.text_rows(rng, self.config.text_rows, self.config.text_length)
        with torch.no_grad():
            former = self.former(ids).log_softmax(dim=-1)
        now = self.model.language_model(ids).log_softmax(dim=-1)
        return F.kl_div(now.flatten(0, 1), former.flatten(0, 1), log_target=True, reduction="batchmean")

    def run(self, minutes: float, report_every_s: float, save_every_s: float) -> None:
        """Train until the budget is used, reporting and saving on the way and at the end."""
        last_save_s = last_report_s = self.elapsed_s
        losses: list[dict[str, float]] = []
        while (progress := self.elapsed_s / (60 * minutes)) < 1.0:
            began = time.monotonic()
            losses.append(self.train_step(progress))
            if self.elapsed_s - last_report_s > report_every_s:
                self.report(losses, progress)
                losses, last_report_s = [], self.elapsed_s
            self.elapsed_s += time.monotonic() - began
            if self.elapsed_s - last_save_s > save_every_s:
                self.save()
                last_save_s = self.elapsed_s
        self.report(losses, 1.0)
        self.save()

    @torch.no_grad()
    def report(self, losses: list[dict[str, float]], progress: float) -> None:
        """Append one line to log.jsonl and print it: losses since the last, and exact answers to held-out drawings."""
        asks = progress >= self.config.look_share
        names = losses[-1] if losses else {}
        line: dict[str, Any] = {
            "step": self.step,
            "drawings": self.num_drawings,
            "elapsed_s": round(self.elapsed_s, 1),
            "progress": round(progress, 4),
            **{name: round(sum(one.get(name, 0.0) for one in losses) / len(losses), 4) for name in names},
        }
        drawings = [draw("held_out", number) for number in range(96)]
        if asks:
            line["answers"] = exact_by_kind(self.model, self.encoder, drawings)
            line["held_out_loss"] = round(
                mean_loss(self.model.language_model, self.text.held_out_source[:2049], 512), 4
            )
        else:
            line["classified"] = self._classified(drawings)
        text = json.dumps(line)
        print(text, flush=True)
        with (self.out / "log.jsonl").open("a") as log:
            log.write(text + "\n")

    def _classified(self, drawings: list[Drawing]) -> dict[str, float]:
        embeddings = self.model.embeddings(pixels_of([one.image for one in drawings], self.model.config.image_size))
        right = answer_labels(drawings)
        found = {kind: logits.argmax(dim=-1) for kind, logits in self.classifiers.answers(embeddings).items()}
        return {
            kind: round(((found[kind] == right[kind]).sum() / (right[kind] >= 0).sum()).item(), 3) for kind in ANSWERS
        }

    def save(self) -> None:
        """Replace the checkpoint."""
        state: dict[str, Any] = {
            "model": self.model.state_dict(),
            "classifiers": self.classifiers.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
            "num_drawings": self.num_drawings,
            "elapsed_s": self.elapsed_s,
        }
        replace_checkpoint(self.out, state)

    def resume(self) -> None:
        """Continue from the directory's checkpoint, if it has one."""
        state = read_checkpoint(self.out)
        if state is None:
            return
        self.model.load_state_dict(state["model"])
        self.classifiers.load_state_dict(state["classifiers"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.num_drawings, self.elapsed_s = state["step"], state["num_drawings"], state["elapsed_s"]


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, required=True, help="wall-time budget; the rates end at zero")
    parser.add_argument("--out", type=Path, required=True, help="run directory, made if missing")
    parser.add_argument("--language", type=Path, required=True, help="run directory of training.train: the decoder")
    arguments = parser.parse_args()

    config, tower = SeeConfig(), TowerConfig()
    torch.set_num_threads(1)
    torch.manual_seed(config.seed)
    arguments.out.mkdir(parents=True, exist_ok=True)
    before = load_run(arguments.language)
    settings = {"see": asdict(config), "tower": asdict(tower), "model": before.settings["model"]}
    (arguments.out / "run.json").write_text(json.dumps(settings, indent=2) + "\n")
    before.tokenizer.save(str(arguments.out / "tokenizer.json"))
    text = Data(before.tokenizer, read_corpus(config.seed), config.seed)
    model = SeeingModel(tower, before.model)
    trainer = SeeTrainer(arguments.out, text, model, config)
    trainer.resume()
    trainer.run(arguments.minutes, report_every_s=120, save_every_s=180)


if __name__ == "__main__":
    main()
