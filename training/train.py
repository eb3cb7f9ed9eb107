"""Train penstock-mini: `python -m training.train --minutes 90 --out runs/mini`.

The run directory receives tokenizer.json, run.json (settings), log.jsonl (one line per report) and
checkpoint.pt (tensors and numbers only), from which the same command continues. Every batch depends on the
seed and the step alone. The learning rate warms up, holds, and falls to zero over the last part of the
budget, which is wall time under --minutes and steps under --steps.
"""

import argparse
import json
import math
import os
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

from penstock.eval.sets.docstrings import HELD_OUT_PHRASINGS
from penstock.eval.sets.library import Document, is_held_out, library_root, split_documents
from training.evaluate import exact_match, mean_loss
from training.model import MiniModel, ModelConfig
from training.muon import Muon
from training.questions import (
    SYSTEM_PROMPTS,
    TRAINING_PHRASINGS,
    Entry,
    Question,
    completion_questions,
    phrased,
    read_entries,
    training_questions,
)
from training.tokenizer import ChatEncoder, load_tokenizer, train_tokenizer

Ids = NDArray[np.int32]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """How the run is made; the defaults made the shipped model."""

    seed: int = 1
    batch_tokens: int = 4096
    """Tokens per step. Up: smoother steps, fewer of them in the same time."""
    short_length: int = 512
    """Row length of most steps."""
    long_length: int = 2048
    """Row length of the remaining steps, and the context the model is good for."""
    long_share: float = 0.10
    """Share of steps at the long length. Up: better far context, slower steps."""
    chat_share: float = 0.50
    """Share of rows that are chats while the rate holds. Up: more answers remembered, weaker Python."""
    late_chat_share: float = 0.60
    """The same share while the rate falls, when what is seen last is kept best."""
    answer_weight: float = 2.0
    """Weight of an answer's token in the loss beside a source token's 1. Up: answers are remembered sooner."""
    matrix_rate: float = 6e-3
    """Peak rate of Muon, for the matrices inside the layers."""
    embedding_rate: float = 4e-3
    """Peak rate of AdamW, for the embedding and the norms."""
    weight_decay: float = 0.05
    warmup_steps: int = 40
    decay_fraction: float = 0.50
    """Last part of the budget over which the rate falls to zero."""


@dataclass(frozen=True, slots=True)
class Chats:
    """Encoded exchanges laid end to end, with what is needed to draw one of them."""

    ids: Ids
    learned: NDArray[np.bool_]
    starts: NDArray[np.int64]
    cumulative: NDArray[np.float64]
    late_cumulative: NDArray[np.float64]
    systems: list[list[int]]

    def draw(self, rng: np.random.Generator, late: bool) -> tuple[Ids, NDArray[np.bool_]]:
        """One exchange, drawn by weight, or by the weight it has in the run's last part."""
        cumulative = self.late_cumulative if late else self.cumulative
        which = int(np.searchsorted(cumulative, rng.random(), side="right"))
        span = slice(self.starts[which], self.starts[which + 1])
        return self.ids[span], self.learned[span]


class Data:
    """Everything a step or a report draws from, encoded once."""

    def __init__(self, tokenizer: Tokenizer, corpus: "Corpus", seed: int) -> None:
        self.encoder = ChatEncoder(tokenizer)
        self.source = self.encoder.documents([document.text for document in corpus.training])
        self.held_out_source = self.encoder.documents([document.text for document in corpus.held_out])
        self.chats = self._encode_chats(corpus.questions)
        seen = [entry for entry in corpus.entries if not is_held_out(entry.name)]
        picked = random.Random(seed).sample(seen, min(200, len(seen)))
        self.seen_probe = phrased(picked, TRAINING_PHRASINGS[:1])
        self.paraphrase_probe = phrased(picked, HELD_OUT_PHRASINGS[:1])

    def batch(self, step: int, config: TrainConfig, late: bool) -> tuple[Tensor, Tensor]:
        """Rows of ids [B, T + 1] and each token's weight in the loss [B, T + 1] (the first column's is unused)."""
        rng = np.random.default_rng((config.seed, step))
        chat_share = config.late_chat_share if late else config.chat_share
        length = config.long_length if rng.random() < config.long_share else config.short_length
        rows, weights = [], []
        for _ in range(config.batch_tokens // length):
            if rng.random() < chat_share:
                row, learned = self._chat_row(rng, length + 1, late)
                weight = learned * np.float32(config.answer_weight)
            else:
                row = self._source_row(rng, length + 1)
                weight = np.ones(length + 1, dtype=np.float32)
            rows.append(row)
            weights.append(weight)
        return torch.from_numpy(np.stack(rows)).long(), torch.from_numpy(np.stack(weights))

    def text_rows(
        self, rng: np.random.Generator, num_rows: int, length: int, *, chat_share: float = 0.5, late: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Rows of ids, such a share of them chats, and which ids are of answers [num_rows, length] each.

        ``late``: chats are drawn by the weights of the run's last part.
        """
        rows = [
            self._chat_row(rng, length, late)
            if rng.random() < chat_share
            else (self._source_row(rng, length), np.zeros(length, dtype=np.bool_))
            for _ in range(num_rows)
        ]
        ids, learned = zip(*rows, strict=True)
        return torch.from_numpy(np.stack(ids)).long(), torch.from_numpy(np.stack(learned))

    def _source_row(self, rng: np.random.Generator, size: int) -> Ids:
        start = int(rng.integers(0, len(self.source) - size))
        return self.source[start : start + size]

    def _chat_row(self, rng: np.random.Generator, size: int, late: bool) -> tuple[Ids, NDArray[np.bool_]]:
        """Whole chats, of one to three exchanges each, from the row's first position to its last."""
        ids: list[int] = []
        learned: list[bool] = []
        while len(ids) < size:
            if rng.random() < 0.15:
                system = self.chats.systems[int(rng.integers(len(self.chats.systems)))]
                ids.extend(system)
                learned.extend([False] * len(system))
            for _ in range(int(rng.choice((1, 1, 1, 1, 1, 2, 3)))):
                exchange, mask = self.chats.draw(rng, late)
                ids.extend(exchange.tolist())
                learned.extend(mask.tolist())
            ids.append(self.encoder.end_of_text_id)
            learned.append(False)
        return np.array(ids[:size], dtype=np.int32), np.array(learned[:size], dtype=np.bool_)

    def _encode_chats(self, questions: Sequence[Question]) -> Chats:
        ids: list[int] = []
        learned: list[bool] = []
        starts = [0]
        for question in questions:
            exchange, mask = self.encoder.exchange(question.prompt, question.answer)
            ids.extend(exchange)
            learned.extend(mask)
            starts.append(len(ids))
        return Chats(
            np.array(ids, dtype=np.int32),
            np.array(learned, dtype=np.bool_),
            np.array(starts, dtype=np.int64),
            _cumulative([q.weight for q in questions]),
            _cumulative([q.weight * q.late_factor for q in questions]),
            [self.encoder.message("system", prompt) for prompt in SYSTEM_PROMPTS],
        )


def _cumulative(weights: Sequence[float]) -> NDArray[np.float64]:
    sums = np.cumsum(np.array(weights, dtype=np.float64))
    sums /= sums[-1]
    return sums


@dataclass(frozen=True, slots=True)
class Corpus:
    """The texts before encoding."""

    training: list[Document]
    held_out: list[Document]
    entries: list[Entry]
    questions: list[Question]

    def texts(self) -> Iterator[str]:
        """What the tokenizer learns from: training material only, each answer once."""
        yield from (document.text for document in self.training)
        yield from dict.fromkeys(question.answer for question in self.questions)
        yield from (question.prompt for question in self.questions[::10])


def read_corpus(seed: int) -> Corpus:
    """The running Python's standard library as documents, entries and questions."""
    training, held_out = split_documents(library_root())
    entries = read_entries()
    questions = [*training_questions(entries, seed), *completion_questions(training)]
    return Corpus(training, held_out, entries, questions)


def schedule(config: TrainConfig, step: int, progress: float) -> float:
    """The factor on the peak rate, given the step and the share of the budget used."""
    warm = min(1.0, (step + 1) / config.warmup_steps)
    left = min(1.0, (1.0 - progress) / config.decay_fraction)
    return warm * max(0.0, left)


def make_optimizers(model: MiniModel, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for the embedding and the norms."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    embedding = [p for n, p in model.named_parameters() if "embed" in n]
    norms = [p for p in model.parameters() if p.ndim == 1]
    muon = Muon(matrices, lr=config.matrix_rate, weight_decay=config.weight_decay)
    adamw = torch.optim.AdamW(
        [{"params": embedding, "weight_decay": config.weight_decay}, {"params": norms, "weight_decay": 0.0}],
        lr=config.embedding_rate,
        betas=(0.9, 0.95),
    )
    for optimizer in (muon, adamw):
        for group in optimizer.param_groups:
            group["peak_rate"] = group["lr"]
    return [muon, adamw]


def batch_loss(model: MiniModel, ids: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean cross-entropy in nats; tokens of weight 0 cost no output projection."""
    hidden = model.hidden(ids[:, :-1])
    wanted = weights[:, 1:] > 0
    losses = F.cross_entropy(model.logits(hidden[wanted]), ids[:, 1:][wanted], reduction="none")
    wanted_weights = weights[:, 1:][wanted]
    return (losses * wanted_weights).sum() / wanted_weights.sum()


class Trainer:
    """One run: its model, optimizers and directory."""

    def __init__(self, out: Path, data: Data, model: MiniModel, config: TrainConfig) -> None:
        self.out = out
        self.data = data
        self.model = model
        self.config = config
        self.optimizers = make_optimizers(model, config)
        self.step = 0
        self.elapsed_s = 0.0
        self.num_tokens = 0

    def train_step(self, progress: float) -> float:
        """Take one step; returns its loss in nats per learned token."""
        factor = schedule(self.config, self.step, progress)
        late = progress > 1.0 - self.config.decay_fraction
        ids, weights = self.data.batch(self.step, self.config, late)
        loss = batch_loss(self.model, ids, weights)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_rate"] * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.num_tokens += ids[:, 1:].numel()
        return loss.item()

    def run(self, minutes: float | None, steps: int | None, report_every: int, save_every_s: float) -> None:
        """Train until the budget is used, reporting and saving on the way and at the end."""
        last_save_s = self.elapsed_s
        losses: list[float] = []
        while True:
            progress = self.step / steps if steps else self.elapsed_s / (60 * (minutes or 1))
            if progress >= 1.0:
                break
            began = time.monotonic()
            losses.append(self.train_step(progress))
            if self.step % report_every == 0:
                self.report(losses, progress)
                losses = []
            self.elapsed_s += time.monotonic() - began
            if self.elapsed_s - last_save_s > save_every_s:
                self.save()
                last_save_s = self.elapsed_s
        self.report(losses, 1.0)
        self.save()

    def report(self, losses: list[float], progress: float) -> None:
        """Append one line to log.jsonl and print it."""
        held_out = mean_loss(self.model, self.data.held_out_source[:16_385], self.config.short_length)
        line = {
            "step": self.step,
            "tokens": self.num_tokens,
            "elapsed_s": round(self.elapsed_s, 1),
            "progress": round(progress, 4),
            "train_loss": round(sum(losses) / max(1, len(losses)), 4),
            "held_out_loss": round(held_out, 4),
            "held_out_perplexity": round(math.exp(held_out), 3),
            "exact_match_seen": exact_match(self.model, self.data.encoder, self.data.seen_probe),
            "exact_match_paraphrase": exact_match(self.model, self.data.encoder, self.data.paraphrase_probe),
        }
        text = json.dumps(line)
        print(text, flush=True)
        with (self.out / "log.jsonl").open("a") as log:
            log.write(text + "\n")

    def save(self) -> None:
        """Replace the checkpoint."""
        state: dict[str, Any] = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
            "elapsed_s": self.elapsed_s,
            "num_tokens": self.num_tokens,
        }
        replace_checkpoint(self.out, state)

    def resume(self) -> None:
        """Continue from the directory's checkpoint, if it has one."""
        state = read_checkpoint(self.out)
        if state is None:
            return
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.elapsed_s, self.num_tokens = state["step"], state["elapsed_s"], state["num_tokens"]


def replace_checkpoint(out: Path, state: dict[str, Any]) -> None:
    """Write a run directory's checkpoint in one rename, so that a cut-off run leaves a whole one."""
    partial = out / "checkpoint.partial"
    torch.save(state, partial)
    os.replace(partial, out / "checkpoint.pt")


def read_checkpoint(out: Path) -> dict[str, Any] | None:
    """Return what a run directory's checkpoint holds, None if there is none."""
    path = out / "checkpoint.pt"
    state: dict[str, Any] | None = torch.load(path, weights_only=True) if path.exists() else None
    return state


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--minutes", type=float, help="wall-time budget; the rate falls to zero at its end")
    budget.add_argument("--steps", type=int, help="step budget; use this to repeat a run exactly")
    parser.add_argument("--out", type=Path, required=True, help="run directory, made if missing")
    parser.add_argument("--threads", type=int, default=3, help="CPU threads torch may use")
    parser.add_argument("--report-every", type=int, default=50, help="steps between lines of log.jsonl")
    parser.add_argument("--save-minutes", type=float, default=4.0, help="wall time between checkpoints")
    arguments = parser.parse_args()

    config = TrainConfig()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(config.seed)
    arguments.out.mkdir(parents=True, exist_ok=True)
    corpus = read_corpus(config.seed)
    tokenizer_path = arguments.out / "tokenizer.json"
    if not tokenizer_path.exists():
        train_tokenizer(corpus.texts()).save(str(tokenizer_path))
    tokenizer = load_tokenizer(tokenizer_path)
    data = Data(tokenizer, corpus, config.seed)
    model = MiniModel(ModelConfig(vocab_size=tokenizer.get_vocab_size(), max_positions=config.long_length))
    sizes = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "source_tokens": len(data.source),
        "held_out_tokens": len(data.held_out_source),
        "entries": len(corpus.entries),
        "questions": len(corpus.questions),
        "chat_tokens": len(data.chats.ids),
    }
    settings = {"train": asdict(config), "model": asdict(model.config), "sizes": sizes}
    (arguments.out / "run.json").write_text(json.dumps(settings, indent=2) + "\n")
    print(json.dumps(sizes), flush=True)

    trainer = Trainer(arguments.out, data, model, config)
    trainer.resume()
    trainer.run(arguments.minutes, arguments.steps, arguments.report_every, 60 * arguments.save_minutes)


if __name__ == "__main__":
    main()
