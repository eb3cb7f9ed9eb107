"""BLEU-4 beside sacrebleu's, on random and awkward text."""

import random

import numpy as np
import pytest
import sacrebleu
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

from penstock.eval.tasks.bleu import bleu_of, bleu_sums, split_words

SOME = (
    'the a cat sat on mat, Mat. 3.14 1,000 x-y 7-8 don\'t (see) [1] {a} "q" &amp; &lt;b&gt; e.g. a.b ... $5 50% '
    "\u00e9t\u00e9 \u4f60\u597d < > #tag a_b <skipped> / \\ \u2014 , . - ' &quot;x&quot;"
)
WORDS = SOME.split(" ")


def corpus_bleu(answers: list[str], references: list[list[str]]) -> float:
    rows = [bleu_sums(answer, wanted) for answer, wanted in zip(answers, references, strict=True)]
    return float(bleu_of(np.array(rows).sum(0)))


def sacre(answers: list[str], references: list[list[str]]) -> float:
    streams = [list(stream) for stream in zip(*references, strict=True)]
    return float(sacrebleu.corpus_bleu(answers, streams).score)


def sentence(draw: random.Random, most: int) -> str:
    return " ".join(draw.choices(WORDS, k=draw.randint(0, most)))


@pytest.mark.parametrize("seed", range(20))
def test_random_corpora_score_as_sacrebleu_has_them(seed: int) -> None:
    draw = random.Random(seed)
    num_references = draw.randint(1, 3)
    references = [[sentence(draw, 14) for _ in range(num_references)] for _ in range(draw.randint(1, 12))]
    # Part of each answer is a reference's, so that orders match.
    answers = [f"{wanted[0][: draw.randint(0, 60)]} {sentence(draw, 3)}" for wanted in references]
    assert corpus_bleu(answers, references) == pytest.approx(sacre(answers, references), abs=1e-9)


@pytest.mark.parametrize(
    ("answer", "reference"),
    [
        ("", "something"),
        ("something", ""),
        ("cat", "cat"),
        ("the cat", "the cat"),
        ("the cat sat", "the cat sat"),
        ("the cat sat on the mat", "the cat sat on the mat"),
        ("nothing alike here at all", "the cat sat on a mat"),
        ("the the the the the the", "the cat"),
        ("a b c d e", "a b x d e"),
        ("one two three four", "one two three four five six seven eight"),
        ("line-\nbreak and\nnew line", "linebreak and new line"),
    ],
)
def test_edge_cases_score_as_sacrebleu_has_them(answer: str, reference: str) -> None:
    assert corpus_bleu([answer], [[reference]]) == pytest.approx(sacre([answer], [[reference]]), abs=1e-9)


@pytest.mark.parametrize("text", [*WORDS, " ".join(WORDS), "".join(WORDS), "2.5.1,3,x-1-y--z 4-", "don't--stop"])
def test_words_are_split_as_mteval_does(text: str) -> None:
    oracle = Tokenizer13a()  # type: ignore[no-untyped-call]
    assert split_words(text) == oracle(text).split()
