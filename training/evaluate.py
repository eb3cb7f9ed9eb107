"""Measure a model: loss on held-out source, and whether greedy decoding gives the documented answers."""

import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

from penstock.eval.sets.docstrings import HELD_OUT_PHRASINGS
from penstock.eval.sets.drawings import Asked, Drawing, draw
from penstock.eval.sets.library import is_held_out, library_root, split_documents
from training.model import MiniModel
from training.questions import (
    HELD_OUT_REFUSALS,
    POPULAR_WEIGHT,
    REFUSAL,
    TRAINING_PHRASINGS,
    Question,
    phrased,
    read_entries,
)
from training.seeing import SeeingModel, pixels_of
from training.tokenizer import ChatEncoder

EVALUATION_LENGTH = 512
FIRST_DRAWING, NUM_DRAWINGS = 10_000, 1_600
"""Held-out drawings of the model card: none that training asked about on its way"""
SAMPLE_SIZE = 1000

WELL_KNOWN = (
    "len",
    "print",
    "sorted",
    "zip",
    "str.split",
    "list.append",
    "dict.get",
    "math.sqrt",
    "os.path.join",
    "os.getcwd",
    "json.dumps",
    "json.loads",
    "re.sub",
    "itertools.chain",
    "functools.lru_cache",
    "collections.Counter",
    "textwrap.dedent",
    "random.choice",
    "shutil.copy",
    "subprocess.run",
)
"""Asked one by one for the model card."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scores:
    """What one evaluation found; shares are of questions answered word for word by greedy decoding."""

    held_out_loss: float
    held_out_perplexity: float
    held_out_perplexity_per_byte: float
    exact_match_popular: float
    exact_match_seen: float
    exact_match_paraphrase_popular: float
    exact_match_paraphrase: float
    exact_match_held_out_modules: float
    exact_match_refusals: float
    num_seen: int
    num_popular: int
    num_held_out: int
    answers: dict[str, str]


def score(model: MiniModel, tokenizer: Tokenizer, seed: int) -> Scores:
    """Everything the model card reports, on up to `SAMPLE_SIZE` objects of each group."""
    encoder = ChatEncoder(tokenizer)
    _, held_out_documents = split_documents(library_root())
    texts = [document.text for document in held_out_documents]
    ids = encoder.documents(texts)
    loss = mean_loss(model, ids, EVALUATION_LENGTH)
    num_bytes = sum(len(text.encode()) for text in texts)

    rng = random.Random(seed)
    entries = read_entries()
    seen = [entry for entry in entries if not is_held_out(entry.name)]
    popular = [entry for entry in seen if entry.weight >= POPULAR_WEIGHT]
    unseen = [entry for entry in entries if is_held_out(entry.name)]
    some_seen = rng.sample(seen, min(SAMPLE_SIZE, len(seen)))
    some_popular = rng.sample(popular, min(SAMPLE_SIZE, len(popular)))

    def share(questions: Sequence[Question]) -> float:
        return round(exact_match(model, encoder, questions), 4)

    return Scores(
        held_out_loss=round(loss, 4),
        held_out_perplexity=round(math.exp(loss), 3),
        held_out_perplexity_per_byte=round(math.exp(loss * len(ids) / num_bytes), 4),
        exact_match_popular=share(phrased(some_popular, TRAINING_PHRASINGS[:1])),
        exact_match_seen=share(phrased(some_seen, TRAINING_PHRASINGS[:1])),
        exact_match_paraphrase_popular=share(phrased(some_popular, HELD_OUT_PHRASINGS)),
        exact_match_paraphrase=share(phrased(some_seen, HELD_OUT_PHRASINGS)),
        exact_match_held_out_modules=share(phrased(unseen, TRAINING_PHRASINGS[:1])),
        exact_match_refusals=share([Question(prompt, REFUSAL, 1.0) for prompt in HELD_OUT_REFUSALS]),
        num_seen=len(seen),
        num_popular=len(popular),
        num_held_out=len(unseen),
        answers={name: answer(model, encoder, f"What does {name} do?") for name in WELL_KNOWN},
    )


def answer(model: MiniModel, encoder: ChatEncoder, prompt: str, max_tokens: int = 64) -> str:
    """The model's greedy reply to one message."""
    return encoder.decode(generate(model, encoder, encoder.prompt(prompt), max_tokens))


def complete(model: MiniModel, encoder: ChatEncoder, text: str, max_tokens: int = 64) -> str:
    """The model's greedy continuation of a text."""
    return encoder.decode(generate(model, encoder, encoder.plain(text), max_tokens))


@torch.no_grad()
def generate(model: MiniModel, encoder: ChatEncoder, prompt: Sequence[int], max_tokens: int) -> list[int]:
    """Greedy ids after the prompt, without the token that ended them; recomputes the prefix each step."""
    ids = list(prompt)
    while len(ids) - len(prompt) < max_tokens:
        hidden = model.hidden(torch.tensor([ids]))[0, -1]
        token = int(model.logits(hidden).argmax())
        if token in (encoder.im_end_id, encoder.end_of_text_id):
            break
        ids.append(token)
    return ids[len(prompt) :]


@torch.no_grad()
def mean_loss(model: MiniModel, ids: NDArray[np.int32], length: int, batch_size: int = 8) -> float:
    """Mean cross-entropy in nats per token over `ids`, cut into rows of `length` predicted tokens."""
    num_rows = (len(ids) - 1) // length
    # Row r predicts tokens r*length+1 .. (r+1)*length, so neighbours share one token of input.
    starts = np.arange(num_rows) * length
    rows = torch.from_numpy(ids[starts[:, None] + np.arange(length + 1)]).long()
    total = 0.0
    for chunk in torch.split(rows, batch_size):
        logits = model(chunk[:, :-1])
        total += F.cross_entropy(logits.flatten(0, 1).float(), chunk[:, 1:].flatten(), reduction="sum").item()
    return total / (num_rows * length)


@torch.no_grad()
def exact_match(model: MiniModel, encoder: ChatEncoder, questions: Sequence[Question], batch_size: int = 32) -> float:
    """Share of questions that greedy decoding answers with exactly the expected text.

    Greedy decoding gives the expected ids if and only if each of them is the top choice after the ones before
    it, so one forward pass over question and answer decides it without generating.
    """
    encoded = sorted((encoder.exchange(q.prompt, q.answer) for q in questions), key=lambda pair: len(pair[0]))
    hits = 0
    for start in range(0, len(encoded), batch_size):
        group = encoded[start : start + batch_size]
        ids, learned = padded(group)
        right = model(ids[:, :-1]).argmax(dim=-1) == ids[:, 1:]
        hits += int((right | ~learned[:, 1:]).all(dim=1).sum())
    return hits / len(encoded)


@dataclass(frozen=True, kw_only=True, slots=True)
class SeeingScores:
    """For each kind of question about held-out drawings, the share that greedy decoding answers word for word."""

    num_drawings: int
    num_questions: dict[str, int]
    trained_words: dict[str, float]
    """Asked in phrasings that were trained on"""
    held_out_words: dict[str, float]


def score_seeing(model: SeeingModel, tokenizer: Tokenizer) -> SeeingScores:
    """What the model card reports about seeing."""
    encoder = ChatEncoder(tokenizer)
    drawings = [draw("held_out", number) for number in range(FIRST_DRAWING, FIRST_DRAWING + NUM_DRAWINGS)]
    return SeeingScores(
        num_drawings=len(drawings),
        num_questions=dict(Counter(kind for drawing in drawings for kind, _ in kinds_of(drawing))),
        trained_words=exact_by_kind(model, encoder, drawings),
        held_out_words=exact_by_kind(model, encoder, drawings, in_held_out_words=True),
    )


@torch.no_grad()
def exact_by_kind(
    model: SeeingModel,
    encoder: ChatEncoder,
    drawings: Sequence[Drawing],
    *,
    in_held_out_words: bool = False,
    batch_size: int = 64,
) -> dict[str, float]:
    """For each kind of question the share that is answered exactly, each as a chat's first, as `exact_match` has it."""
    hits: dict[str, list[bool]] = {}
    for start in range(0, len(drawings), batch_size):
        group = drawings[start : start + batch_size]
        seen_BPE = model.embeddings(pixels_of([drawing.image for drawing in group], model.config.image_size))
        asked = [(i, kind, one) for i, drawing in enumerate(group) for kind, one in kinds_of(drawing)]
        exchanges = [
            encoder.exchange(one.held_out_text if in_held_out_words else one.text, one.answer, seen_BPE.shape[1])
            for _, _, one in asked
        ]
        ids, learned = padded(exchanges)
        of_question = seen_BPE[[i for i, _, _ in asked]]
        hidden = model.hidden(ids[:, :-1], encoder.image_id, of_question)
        wrong = torch.zeros_like(learned[:, 1:])
        wanted = learned[:, 1:]
        wrong[wanted] = model.language_model.logits(hidden[wanted]).argmax(dim=-1) != ids[:, 1:][wanted]
        for (_, kind, _), is_wrong in zip(asked, wrong.any(dim=1).tolist(), strict=True):
            hits.setdefault(kind, []).append(not is_wrong)
    return {kind: round(sum(found) / len(found), 4) for kind, found in sorted(hits.items())}


def kinds_of(drawing: Drawing) -> list[tuple[str, Asked]]:
    """A drawing's questions with their kinds; one of two shapes has to be found first, which is a kind of its own."""
    of_two = ", one of two" if drawing.picture == "scene" and len(drawing.parts) > 1 else ""
    return [(asked.kind + of_two, asked) for asked in drawing.questions]


def padded(exchanges: Sequence[tuple[list[int], list[bool]]]) -> tuple[Tensor, Tensor]:
    """Ids and flags as tensors [B, T]; padding stands to the right, where causal attention cannot see it."""
    width = max(len(ids) for ids, _ in exchanges)
    ids = torch.tensor([row + [0] * (width - len(row)) for row, _ in exchanges])
    return ids, torch.tensor([flags + [False] * (width - len(flags)) for _, flags in exchanges])
