"""Questions about drawings as the decoder is asked them: many wordings, and every question beside the same image.

A row is an image and branches after it. A branch is a chat of one or more turns that sees the image and itself, and
stands where it would if it were alone: as many first questions as the drawing has, for the price of one image.

Dimension letters: B rows, T tokens, N names, P patches, E the decoder's width, H query heads, G KV heads, D head width.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

import torch
from torch import Tensor

from penstock.eval.sets.drawings import PHRASINGS, SHAPES, Asked, Drawing, Part, draw
from training.looking import PATCH_CLASSES, Labels
from training.model import Layer, Layout, MiniModel, rotate
from training.tokenizer import ChatEncoder

MORE_PHRASINGS: dict[str, tuple[str, ...]] = {
    "shape": (
        "What shape do you see?",
        "What kind of shape is this?",
        "Tell me the shape.",
        "Which shape was drawn?",
        "What shape is it?",
        "What is drawn here?",
    ),
    "shape of a colour": (
        "Which shape has the colour {colour}?",
        "What kind of shape is {colour}?",
        "Tell me which shape is {colour}.",
        "Which one is {colour}?",
        "What shape was drawn in {colour}?",
        "What is {colour} here?",
    ),
    "colour": (
        "What is the colour of the {thing}?",
        "In which colour was the {thing} drawn?",
        "Tell me the colour of the {thing}.",
        "Which color does the {thing} have?",
        "What colour has the {thing}?",
        "What color was used for the {thing}?",
    ),
    "position": (
        "In what part of the drawing is the {thing}?",
        "Tell me where the {thing} is.",
        "Where can you see the {thing}?",
        "Which part has the {thing}?",
        "What is the place of the {thing}?",
        "Find the {thing}.",
    ),
    "count": (
        "How many {thing}s can you see?",
        "Tell me the number of {thing}s.",
        "What is the count of {thing}s?",
        "How many {thing}s were drawn?",
        "Give the number of shapes.",
        "What number of {thing}s do you see?",
        "How many are there?",
        "How many {thing}s does the drawing have?",
        "Say how many {thing}s there are.",
        "Can you count the {thing}s?",
        "Please count the {thing}s.",
        "What is the total of {thing}s?",
        "Number of {thing}s?",
        "What number of shapes is there?",
    ),
    "digit": (
        "Which number is this?",
        "What digit was drawn?",
        "Tell me the digit.",
        "Which digit is it?",
        "Name the digit.",
        "What is the digit?",
    ),
    "word": (
        "What word is this?",
        "Tell me the word.",
        "What is the word?",
        "Which word do you see?",
        "What word was written?",
        "What does the drawing say?",
    ),
}
"""For training alone, beside `PHRASINGS`; none is a held-out one"""

NOT_WANTED = -100
"""Where no loss is taken of what follows, torch's own number for it"""
_MANY_TURNS_SHARE = 0.2
"""Of rows with a branch of several turns"""
_LEAST_QUESTIONS = 4


@dataclass(frozen=True, slots=True)
class Pointers:
    """Tokens that should look at certain others of their row, for the sake of a part of its drawing."""

    rows: Tensor
    """[N]"""
    tokens: Tensor
    """[N]"""
    at: Tensor
    """At which tokens [N, T]"""
    parts: list[Part]
    """What each is to find"""


@dataclass(frozen=True, slots=True)
class Rows:
    """Drawings' questions and answers as the decoder reads them, all padded to one length."""

    ids: Tensor
    """[B, T]"""
    wanted: Tensor
    """What follows a token in its branch where that is of an answer, else `NOT_WANTED` [B, T]"""
    layout: Layout
    names: Pointers
    """The last tokens of names and colours that say which shape is meant, and the shape's patches"""
    answers: Pointers
    """The tokens before each token of an answer about such a shape, and the last token of that name or colour"""


def two_shapes(number: int) -> Drawing:
    """A training drawing of two shapes, another for each number."""
    scenes = (draw("training", number * 64 + i, "scene") for i in count())
    return next(scene for scene in scenes if len(scene.parts) == 2)


def asked_rows(
    drawings: Sequence[Drawing], encoder: ChatEncoder, of_patches: Labels, draws: random.Random, most_questions: int = 6
) -> Rows:
    """A row for each drawing; `of_patches` are the labels of its patches, in the order of the image's tokens."""
    rows = [_Row(encoder, labels, drawing) for labels, drawing in zip(of_patches["part"], drawings, strict=True)]
    for row, drawing in zip(rows, drawings, strict=True):
        for chat in _chats(drawing, draws, most_questions):
            row.add(chat)
    branches_BT = _padded([row.branches for row in rows], fill=-1)
    # Padding is a branch of its own, so that it has something to see.
    visible_BTT = (branches_BT[:, None, :] == 0) | (branches_BT[:, None, :] == branches_BT[:, :, None])
    layout = Layout(_padded([row.positions for row in rows]), visible_BTT.tril().unsqueeze(1))
    return Rows(
        _padded([row.ids for row in rows]),
        _padded([row.wanted for row in rows], fill=NOT_WANTED),
        layout,
        _pointers([row.names for row in rows], branches_BT.shape[1]),
        _pointers([row.answers for row in rows], branches_BT.shape[1]),
    )


def _pointers(rows: Sequence[Sequence[tuple[int, list[int], Part]]], width: int) -> Pointers:
    flat = [(i, token, at, part) for i, row in enumerate(rows) for token, at, part in row]
    looked_at = torch.zeros(len(flat), width, dtype=torch.bool)
    for n, (_, _, at, _) in enumerate(flat):
        looked_at[n, at] = True
    return Pointers(
        torch.tensor([i for i, _, _, _ in flat], dtype=torch.long),
        torch.tensor([token for _, token, _, _ in flat], dtype=torch.long),
        looked_at,
        [part for _, _, _, part in flat],
    )


def _chats(drawing: Drawing, draws: random.Random, most_questions: int) -> list[list[tuple[Asked, str]]]:
    """Each of a drawing's questions in some wording, and again in others until there are `_LEAST_QUESTIONS`."""
    asked = [one for one in drawing.questions for _ in range(-(-_LEAST_QUESTIONS // len(drawing.questions)))]
    draws.shuffle(asked)
    worded = [
        (one, draws.choice((*PHRASINGS[one.phrasing], *MORE_PHRASINGS[one.phrasing]))) for one in asked[:most_questions]
    ]
    num_together = draws.choice((2, 3)) if draws.random() < _MANY_TURNS_SHARE else 1
    return [worded[:num_together], *([one] for one in worded[num_together:])]


def _padded(rows: Sequence[Sequence[int]], fill: int = 0) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows])


class _Row:
    """An image and the branches after it so far."""

    def __init__(self, encoder: ChatEncoder, part_P: Tensor, drawing: Drawing) -> None:
        start = [encoder.im_start_id, *encoder.plain("user\n")]
        self.ids = [*start, *[encoder.image_id] * len(part_P)]
        self.wanted = [NOT_WANTED] * len(self.ids)
        self.positions = list(range(len(self.ids)))
        self.branches = [0] * len(self.ids)
        self.names: list[tuple[int, list[int], Part]] = []
        self.answers: list[tuple[int, list[int], Part]] = []
        self._encoder = encoder
        self._num_patches = len(part_P)
        self._parts = {part.name: part for part in drawing.parts}
        self._patches = {
            part.name: (part_P == PATCH_CLASSES["part"].index(part.name)).nonzero().flatten().add(len(start)).tolist()
            for part in drawing.parts
        }

    def add(self, chat: list[tuple[Asked, str]]) -> None:
        """Add a branch."""
        opening = self.branches.count(0)
        branch = self.branches[-1] + 1
        for i, (asked, wording) in enumerate(chat):
            # The first turn's opening, with the image, is the row's.
            shown, skipped = (self._num_patches, opening) if i == 0 else (0, 0)
            turn, learned = self._encoder.exchange(wording.format(**asked.about), asked.answer, shown)
            before = len(self.ids) - skipped
            answered = [before + at - 1 for at, is_answer in enumerate(learned) if is_answer]
            gap = "{colour}" if "{colour}" in wording else "{thing}"
            if asked.about.get("thing") in SHAPES and asked.kind != "count" and gap in wording:
                until = wording[: wording.index(gap) + len(gap)].format(**asked.about)
                named = (
                    before + len(self._encoder.message("user", until, shown)) - 3
                )  # an end mark and a newline follow
                part = self._parts[asked.about["thing"]]
                self.names.append((named, self._patches[part.name], part))
                self.answers += [(token, [named], part) for token in answered]
            self.ids += turn[skipped:]
            self.wanted += [NOT_WANTED] * (len(self.ids) - len(self.wanted))
            for token in answered:
                self.wanted[token] = self.ids[token + 1]
        num_new = len(self.ids) - len(self.branches)
        self.positions += range(opening, opening + num_new)
        self.branches += [branch] * num_new


def pointing_loss(model: MiniModel, stream_BTE: Tensor, layer: int, layout: Layout, pointers: Pointers) -> Tensor:
    """How little a layer looks where it should: the mean of -log of what its heads' shares there are together.

    One head that looks there is enough, and nothing is asked of the others then. `stream_BTE` enters the layer. To
    teach attention where to look is the idea of Liu and others, "Neural machine translation with supervised attention"
    (2016).
    """
    block, config = model.model.layers[layer], model.config
    assert isinstance(block, Layer)
    rows, tokens = pointers.rows, pointers.tokens
    x_BTE = block.input_layernorm(stream_BTE)
    B, T, _ = x_BTE.shape
    cos_B1TD, sin_B1TD = model.turns(T, layout)
    q_NHD = block.self_attn.q_proj(x_BTE[rows, tokens]).unflatten(-1, (config.num_heads, config.head_dim))
    q_NHD = rotate(q_NHD, cos_B1TD[rows, :, tokens], sin_B1TD[rows, :, tokens])
    k_BGTD = block.self_attn.k_proj(x_BTE).view(B, T, config.num_kv_heads, config.head_dim).transpose(1, 2)
    k_BHTD = rotate(k_BGTD, cos_B1TD, sin_B1TD).repeat_interleave(config.num_heads // config.num_kv_heads, dim=1)
    scores_NHT = (q_NHD.unsqueeze(2) @ k_BHTD[rows].transpose(2, 3)).squeeze(2) * config.head_dim**-0.5
    shares_NHT = scores_NHT.masked_fill(~layout.mask[rows, :, tokens], -torch.inf).softmax(dim=-1)
    together_N = (shares_NHT * pointers.at.unsqueeze(1)).sum(dim=(1, 2))
    loss: Tensor = -together_N.clamp(1e-6, 1.0).log().sum() / max(1, len(rows))
    return loss
