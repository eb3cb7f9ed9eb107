"""What the tower is taught before it is asked anything: small classifiers on what enters the decoder.

A drawing's parts are known, so every patch can be told what it shows, and the drawing as a whole what its answers are.
That is many labels for the price of one pass through the tower, where a question gives a token or two for the price of
the decoder as well. The classifiers are thrown away in the end.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from penstock.eval.sets.drawings import ANSWERS, COLOURS, DIGITS, PLACES, SHAPES, SIDE, Drawing, place_of

LETTERS = tuple("abcdefghijklmnopqrstuvwxyz")
PATCH_CLASSES: dict[str, tuple[str, ...]] = {
    "part": ("", *SHAPES, *DIGITS, *LETTERS),
    "colour": ("", *COLOURS),
    "position": ("", *PLACES),
}
"""What a patch can show; "" is the background, which is class 0"""

UNKNOWN = -100
"""A label that no loss is taken of, torch's own number for it"""
_BACKGROUND_WEIGHT = 0.1

Labels = dict[str, Tensor]


def patch_labels(drawings: Sequence[Drawing], patches_a_side: int) -> Labels:
    """For each name in `PATCH_CLASSES` the classes of all patches [B, P]: of the part that has a patch's centre."""
    labels = {name: np.zeros((len(drawings), patches_a_side, patches_a_side), np.int64) for name in PATCH_CLASSES}
    centres = (np.arange(patches_a_side) + 0.5) * SIDE / patches_a_side
    for i, drawing in enumerate(drawings):
        for part in drawing.parts:
            left, top, right, bottom = part.box
            columns, rows = (centres > left) & (centres < right), (centres > top) & (centres < bottom)
            inside = np.ix_(rows, columns)
            classes = {"part": part.name, "colour": part.colour, "position": place_of(part.box)}
            for name, value in classes.items():
                labels[name][i][inside] = PATCH_CLASSES[name].index(value)
    return {name: torch.from_numpy(value).flatten(1) for name, value in labels.items()}


def answer_labels(drawings: Sequence[Drawing]) -> Labels:
    """For each kind of question the answer's class [B], `UNKNOWN` where it is not asked or asked of several parts."""
    labels: Labels = {kind: torch.full((len(drawings),), UNKNOWN) for kind in ANSWERS}
    for i, drawing in enumerate(drawings):
        times = Counter(asked.kind for asked in drawing.questions)
        for asked in drawing.questions:
            if times[asked.kind] == 1:
                labels[asked.kind][i] = ANSWERS[asked.kind].index(asked.answer)
    return labels


class Classifiers(nn.Module):
    """One linear classifier for each name in `PATCH_CLASSES`, and on the mean of all patches one for each kind."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.of_patches = nn.ModuleDict({name: nn.Linear(width, len(of)) for name, of in PATCH_CLASSES.items()})
        self.of_drawings = nn.ModuleDict({name: nn.Linear(width, len(of)) for name, of in ANSWERS.items()})

    def loss(self, embeddings_BPE: Tensor, of_patches: Labels, of_drawings: Labels) -> Tensor:
        """The sum of the classifiers' mean cross-entropies."""
        normed_BPE = F.rms_norm(embeddings_BPE, embeddings_BPE.shape[-1:])
        total = embeddings_BPE.new_zeros(())
        for name, labels_BP in of_patches.items():
            weight = torch.ones(len(PATCH_CLASSES[name]))
            weight[0] = _BACKGROUND_WEIGHT
            logits = self.of_patches[name](normed_BPE)
            total = total + F.cross_entropy(logits.flatten(0, 1), labels_BP.flatten(), weight=weight)
        for kind, logits in self.answers(embeddings_BPE).items():
            if (of_drawings[kind] != UNKNOWN).any():
                total = total + F.cross_entropy(logits, of_drawings[kind], ignore_index=UNKNOWN)
        return total

    def answers(self, embeddings_BPE: Tensor) -> dict[str, Tensor]:
        """For each kind of question the logits of its answers [B, classes]."""
        mean_BE = F.rms_norm(embeddings_BPE, embeddings_BPE.shape[-1:]).mean(dim=1)
        return {kind: classifier(mean_BE) for kind, classifier in self.of_drawings.items()}
