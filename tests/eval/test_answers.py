"""Exact match and F1, worked out by hand after SQuAD's definition."""

import pytest

from penstock.eval.tasks.answers import exact_match, f1, normalize


@pytest.mark.parametrize(
    ("text", "normalized"),
    [
        ("The Cat.", "cat"),
        ("  a  an the ", ""),
        ("theatre and another", "theatre and another"),
        ("It's (not) U.S.", "its not us"),
        ("the-end", "theend"),  # punctuation goes before articles are looked for
        ("caf\u00e9 \u2014 A", "caf\u00e9 \u2014"),  # only ASCII punctuation goes
    ],
)
def test_normalization(text: str, normalized: str) -> None:
    assert normalize(text) == normalized


def test_exact_match_is_after_normalization() -> None:
    assert exact_match("The answer is: 42!", "answer is 42")
    assert not exact_match("answer is 43", "answer is 42")


@pytest.mark.parametrize(
    ("answer", "reference", "score"),
    [
        ("a cat sat", "the cat sat down", 2 * 1.0 * (2 / 3) / (1.0 + 2 / 3)),
        ("cat cat cat", "cat", 2 * (1 / 3) * 1.0 / (1 / 3 + 1.0)),
        ("dog", "cat", 0.0),
        ("", "cat", 0.0),
        ("cat", "Cat.", 1.0),
    ],
)
def test_f1(answer: str, reference: str, score: float) -> None:
    assert f1(answer, reference) == pytest.approx(score)
