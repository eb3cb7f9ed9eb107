"""Teach penstock-mini to find the shape that is meant: `python -m training.find --minutes 32 --sees runs/sees ...`.

It continues a run of `training.see`. Tower, projector and the decoder's first layers rest. In the next layer a name,
or a colour, is taught to look at its shape; in the one after it the answer is taught to look at that name
(`asking.py`); after either, classifiers read there which shape is meant. All layers from there on learn the answers,
and of text what they knew, in more wordings: its answers, and elsewhere what the decoder said before it saw.
"""

import argparse
import copy
import json
import random
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from penstock.eval.sets.drawings import Picture, draw, place_of
from penstock.eval.sets.library import is_held_out
from training.asking import NOT_WANTED, Pointers, asked_rows, pointing_loss, two_shapes
from training.evaluate import exact_by_kind, exact_match, mean_loss
from training.export import load_run
from training.looking import PATCH_CLASSES, patch_labels
from training.questions import NEARBY_PHRASINGS, phrased
from training.seeing import SeeingModel, TowerConfig, pixels_of
from training.train import Data, read_checkpoint, read_corpus, replace_checkpoint

PROBE = range(1000, 1096)
"""Held-out drawings that the log tells of; the model card's are others."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FindConfig:
    """How the run is made."""

    seed: int = 1
    workers: int = 2
    """Threads that each take a part of a step on one core."""
    batch: int = 16
    """Drawings a step."""
    two_shapes_share: float = 0.375
    """Of these with two shapes."""
    counts_share: float = 0.125
    """Of these with shapes to count; the others are as in `training.see`, so that they are not forgotten."""
    most_questions: int = 6
    """About a drawing."""
    first_layer: int = 2
    """From 0, the first that learns: names are of several tokens and have to be read before."""
    pointing_weight: float = 0.3
    """Of how little it looks where it should, beside the answers' loss."""
    reading_weight: float = 0.3
    """Of how little can be read there."""
    text_rows: int = 2
    """Rows of text a step and worker. Up: text stays closer to what it was, fewer drawings in the same time."""
    text_length: int = 128
    text_chat_share: float = 0.5
    text_weight: float = 3.0
    """Of text's loss beside that of the answers about drawings."""
    attention_rate: float = 7e-4
    """Peak rate of AdamW."""
    mlp_rate: float = 3e-4
    """The same for the feed-forward blocks, where most of what is known of text lies."""
    reader_rate: float = 2e-3
    """The same for the classifiers that read what the meant shape is; they are thrown away in the end."""
    warmup_steps: int = 20
    decay_fraction: float = 0.6
    """Last part of the budget over which the rates fall to zero."""


class FindTrainer:
    """One run: model, optimizer and directory."""

    def __init__(self, out: Path, text: Data, model: SeeingModel, former: torch.nn.Module, config: FindConfig) -> None:
        self.out = out
        self.text = text
        self.encoder = text.encoder
        self.model = model.requires_grad_(False)
        self.former = former
        self.config = config
        layers = model.language_model.model.layers[config.first_layer :]
        attention = [p for name, p in layers.named_parameters() if "self_attn" in name]
        mlp = [p for name, p in layers.named_parameters() if "mlp" in name]
        self.taught = [p.requires_grad_() for p in (*attention, *mlp)]
        width = model.language_model.config.hidden_size
        self.name_readers, self.answer_readers = (
            torch.nn.ModuleDict({kind: torch.nn.Linear(width, len(of)) for kind, of in PATCH_CLASSES.items()})
            for _ in range(2)
        )
        readers = [*self.name_readers.parameters(), *self.answer_readers.parameters()]
        groups = [
            {"params": attention, "peak_rate": config.attention_rate},
            {"params": mlp, "peak_rate": config.mlp_rate},
            {"params": readers, "peak_rate": config.reader_rate},
        ]
        self.taught += readers
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), weight_decay=0.0)
        self.step = self.first_step = 0
        self.num_drawings = 0
        self.elapsed_s = 0.0
        self._workers = ThreadPoolExecutor(config.workers)

    def train_step(self, progress: float) -> dict[str, float]:
        """Take one step; returns its losses by name."""
        config = self.config
        size = config.batch // config.workers
        firsts = range(self.num_drawings, self.num_drawings + size * config.workers, size)
        found = list(self._workers.map(lambda first: self._gradients(first, size), firsts))
        self.step += 1
        self.num_drawings = firsts.stop
        for parameter, *gradients in zip(self.taught, *(gradients for gradients, _ in found), strict=True):
            parameter.grad = sum(gradients[1:], start=gradients[0]) / config.workers
        torch.nn.utils.clip_grad_norm_(self.taught, 1.0)
        warm = min(1.0, (self.step - self.first_step) / config.warmup_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_rate"] * warm * min(1.0, (1.0 - progress) / config.decay_fraction)
        self.optimizer.step()
        return {name: sum(losses[name] for _, losses in found) / len(found) for name in found[0][1]}

    def _gradients(self, first: int, size: int) -> tuple[tuple[Tensor, ...], dict[str, float]]:
        """One worker's part of a step: the gradients of its drawings' mean losses, and these by name."""
        config, tower, decoder = self.config, self.model.config, self.model.language_model
        num_pairs, num_counts = round(size * config.two_shapes_share), round(size * config.counts_share)
        pictures: list[Picture | None] = [None] * (size - num_pairs)
        pictures[:num_counts] = ["count" for _ in range(num_counts)]
        drawings = [two_shapes(number) for number in range(first, first + num_pairs)]
        drawings += [draw("training", number, picture) for number, picture in enumerate(pictures, first + num_pairs)]
        with torch.no_grad():
            embeddings_BPE = self.model.embeddings(pixels_of([one.image for one in drawings], tower.image_size))
        labels = patch_labels(drawings, tower.image_size // tower.patch_size)
        draws = random.Random(f"{config.seed} questions {first}")
        rows = asked_rows(drawings, self.encoder, labels, draws, config.most_questions)
        streams = decoder.streams(self.model.inserted(rows.ids, self.encoder.image_id, embeddings_BPE), rows.layout)
        wanted = rows.wanted != NOT_WANTED
        logits = decoder.logits(decoder.model.norm(streams[-1][wanted]))
        layer = config.first_layer
        losses = {
            "ask": F.cross_entropy(logits, rows.wanted[wanted]),
            "name": pointing_loss(decoder, streams[layer], layer, rows.layout, rows.names),
            "answer": pointing_loss(decoder, streams[layer + 1], layer + 1, rows.layout, rows.answers),
            "read": reading_loss(self.name_readers, streams[layer + 1], rows.names),
            "read_again": reading_loss(self.answer_readers, streams[layer + 2], rows.answers),
            "text": self._text_loss(first),
        }
        shown = config.pointing_weight * (losses["name"] + losses["answer"])
        shown = shown + config.reading_weight * (losses["read"] + losses["read_again"])
        total = losses["ask"] + shown + config.text_weight * losses["text"]
        gradients = torch.autograd.grad(total, self.taught)
        return gradients, {name: loss.item() for name, loss in losses.items()}

    def _text_loss(self, seed: int) -> Tensor:
        """Mean over the tokens of rows of text, in nats: the answers' cross-entropy, else divergence from before."""
        config = self.config
        rng = np.random.default_rng((config.seed, seed))
        ids, learned = self.text.text_rows(
            rng, config.text_rows, config.text_length + 1, chat_share=config.text_chat_share, late=False
        )
        now = self.model.language_model(ids[:, :-1]).log_softmax(dim=-1)
        with torch.no_grad():
            former = self.former(ids[:, :-1]).log_softmax(dim=-1)
        wanted = learned[:, 1:]
        answers = F.nll_loss(now[wanted], ids[:, 1:][wanted], reduction="sum")
        others = F.kl_div(now[~wanted], former[~wanted], log_target=True, reduction="sum")
        return (answers + others) / wanted.numel()

    def run(self, minutes: float, report_every_s: float) -> None:
        """Train until the budget is used, reporting and saving on the way and at the end."""
        began, last_report_s, before_s = time.monotonic(), 0.0, self.elapsed_s
        losses: list[dict[str, float]] = []
        while (spent_s := time.monotonic() - began) < 60 * minutes:
            losses.append(self.train_step(spent_s / (60 * minutes)))
            self.elapsed_s = before_s + spent_s
            if spent_s - last_report_s > report_every_s:
                self.report(losses, spent_s / (60 * minutes))
                self.save()
                losses, last_report_s = [], spent_s
        self.report(losses, 1.0)
        self.save()

    @torch.no_grad()
    def report(self, losses: list[dict[str, float]], progress: float) -> None:
        """Append one line to log.jsonl and print it: losses since the last, and exact answers to held-out drawings."""
        names = losses[-1] if losses else {}
        decoder, drawings = self.model.language_model, [draw("held_out", number) for number in PROBE]
        line: dict[str, Any] = {
            "step": self.step,
            "drawings": self.num_drawings,
            "elapsed_s": round(self.elapsed_s, 1),
            "progress": round(progress, 4),
            **{name: round(sum(one[name] for one in losses) / len(losses), 4) for name in names},
            "answers": exact_by_kind(self.model, self.encoder, drawings),
            "in_held_out_words": exact_by_kind(self.model, self.encoder, drawings, in_held_out_words=True),
            "text_answers": exact_match(decoder, self.encoder, self.text.paraphrase_probe),
            "held_out_loss": round(mean_loss(decoder, self.text.held_out_source[:2049], 512), 4),
        }
        text = json.dumps(line)
        print(text, flush=True)
        with (self.out / "log.jsonl").open("a") as log:
            log.write(text + "\n")

    def save(self) -> None:
        """Replace the checkpoint."""
        state: dict[str, Any] = {
            "model": self.model.state_dict(),
            "step": self.step,
            "num_drawings": self.num_drawings,
            "elapsed_s": self.elapsed_s,
        }
        replace_checkpoint(self.out, state)


def reading_loss(readers: torch.nn.ModuleDict, stream_BTE: Tensor, pointers: Pointers) -> Tensor:
    """How little can be read at tokens of the parts that they look for: the mean of three cross-entropies."""
    if not pointers.parts:
        return stream_BTE.new_zeros(())
    found_NE = F.rms_norm(stream_BTE[pointers.rows, pointers.tokens], stream_BTE.shape[-1:])
    shown = [{"part": part.name, "colour": part.colour, "position": place_of(part.box)} for part in pointers.parts]
    losses = []
    for kind, reader in readers.items():
        labels = torch.tensor([PATCH_CLASSES[kind].index(values[kind]) for values in shown])
        losses.append(F.cross_entropy(reader(found_NE), labels))
    return torch.stack(losses).mean()


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, required=True, help="wall-time budget; the rates end at zero")
    parser.add_argument("--out", type=Path, required=True, help="run directory, made if missing")
    parser.add_argument("--sees", type=Path, required=True, help="run directory of training.see")
    parser.add_argument("--language", type=Path, required=True, help="run directory of training.train: the former self")
    arguments = parser.parse_args()

    config = FindConfig()
    torch.set_num_threads(1)
    torch.manual_seed(config.seed)
    arguments.out.mkdir(parents=True, exist_ok=True)
    before = load_run(arguments.language)
    settings = json.loads((arguments.sees / "run.json").read_text())
    before.tokenizer.save(str(arguments.out / "tokenizer.json"))
    corpus = read_corpus(config.seed)
    known = [entry for entry in corpus.entries if not is_held_out(entry.name)]
    nearby = [replace(question, weight=0.3) for question in phrased(known, NEARBY_PHRASINGS)]
    text = Data(before.tokenizer, replace(corpus, questions=[*corpus.questions, *nearby]), config.seed)
    model = SeeingModel(TowerConfig(**settings["tower"]), copy.deepcopy(before.model))
    trainer = FindTrainer(arguments.out, text, model, before.model.requires_grad_(False), config)
    state = read_checkpoint(arguments.sees)
    assert state is not None, f"{arguments.sees} has no checkpoint"
    model.load_state_dict(state["model"])
    trainer.step, trainer.num_drawings, trainer.elapsed_s = state["step"], state["num_drawings"], state["elapsed_s"]
    came = {"step": trainer.step, "num_drawings": trainer.num_drawings, "elapsed_s": trainer.elapsed_s}
    settings = {"came": came, **settings, "find": asdict(config)}
    (arguments.out / "run.json").write_text(json.dumps(settings, indent=2) + "\n")
    trainer.first_step = trainer.step
    trainer.run(arguments.minutes, report_every_s=180)


if __name__ == "__main__":
    main()
