"""BLEU-4 of a corpus (Papineni et al., 2002), as sacrebleu computes it by default (Post, 2018; a test compares them).

Case counts, words are split as mteval-v13a does, the closest reference's length decides the brevity penalty, and an
order of n-grams without a match counts as half, a quarter, ... of one match (NIST's smoothing, "exp").
"""

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

from penstock.eval.statistics import Table

ORDERS = (1, 2, 3, 4)

_ENTITIES = (("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">"))
_SPACED = (
    # ASCII punctuation but . , - and the apostrophe stands alone; the space is in the range as it is in mteval's.
    (re.compile(r"([{-~\[-` -&(-+:-@/])"), r" \1 "),
    # A period or comma does, unless between digits; so does a dash behind a digit.
    (re.compile(r"([^0-9])([.,])"), r"\1 \2 "),
    (re.compile(r"([.,])([^0-9])"), r" \1 \2"),
    (re.compile(r"([0-9])(-)"), r"\1 \2 "),
)


def split_words(text: str) -> list[str]:
    """Return the words of ``text`` as mteval-v13a splits them."""
    text = text.replace("<skipped>", "").replace("-\n", "").replace("\n", " ")
    for entity, character in _ENTITIES:
        text = text.replace(entity, character)
    text = f" {text} "
    for pattern, replacement in _SPACED:
        text = pattern.sub(replacement, text)
    return text.split()


def bleu_sums(answer: str, references: Sequence[str]) -> tuple[float, ...]:
    """Return what one answer adds: its words, the closest reference's, and matches and n-grams of each order."""
    # Spaces at the end are no part of a segment.
    given = split_words(answer.rstrip())
    wanted = [split_words(reference.rstrip()) for reference in references]
    closest = min((len(words) for words in wanted), key=lambda length: (abs(length - len(given)), length))
    matches: list[float] = []
    totals: list[float] = []
    for order in ORDERS:
        most: Counter[tuple[str, ...]] = Counter()
        for words in wanted:
            most |= _n_grams(words, order)
        found = _n_grams(given, order)
        matches.append((found & most).total())
        totals.append(found.total())
    return (len(given), closest, *matches, *totals)


def bleu_of(sums: Table) -> Table:
    """Return BLEU [...], 0 to 100, from sums [..., 10] of ``bleu_sums``."""
    lengths, wanted, matches, totals = sums[..., 0], sums[..., 1], sums[..., 2:6], sums[..., 6:10]
    # The k-th order without a match counts as 2^-k matches.
    halvings = np.cumsum(matches == 0, axis=-1)
    smoothed = np.where(matches == 0, 0.5**halvings, matches)
    is_scored = (matches.sum(-1) > 0) & (totals > 0).all(-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        precision = np.exp(np.log(smoothed / totals).mean(-1))
        brevity = np.exp(np.minimum(0.0, 1 - wanted / lengths))
        score: Table = np.where(is_scored, 100 * brevity * precision, 0.0)
    return score


def _n_grams(words: list[str], order: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(words[i : i + order]) for i in range(len(words) - order + 1))
