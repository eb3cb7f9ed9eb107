"""Reasoning and answer, however the text is cut."""

from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.text.reasoning import ReasoningSplitter


def split(pieces: Iterable[str], *, is_open: bool) -> tuple[str, str]:
    splitter = ReasoningSplitter(is_open=is_open)
    parts = [splitter.push(piece) for piece in pieces] + [splitter.finish()]
    return "".join(part[0] for part in parts), "".join(part[1] for part in parts)


@pytest.mark.parametrize(
    ("text", "is_open", "expected"),
    [
        ("<think>\nwhy  not\n</think>\n\nyes ", False, ("why  not", "yes ")),
        (" <think></think>yes", False, ("", "yes")),
        ("why\n</think>\n\nyes", True, ("why", "yes")),
        ("why", True, ("why", "")),
        ("why </thi", True, ("why </thi", "")),
        (" an answer <think>x</think>", False, ("", " an answer <think>x</think>")),
        ("<thin", False, ("", "<thin")),
        ("<think>a</think>b</think>", False, ("a", "b</think>")),
        ("", False, ("", "")),
        ("", True, ("", "")),
    ],
)
def test_where_it_is_split(text: str, is_open: bool, expected: tuple[str, str]) -> None:
    assert split([text], is_open=is_open) == expected
    assert split(text, is_open=is_open) == expected


@given(
    fragments=st.lists(st.sampled_from(["<think>", "</think>", "<", "</th", "ink>", " \n", "word"]), max_size=10),
    is_open=st.booleans(),
    size=st.integers(1, 9),
)
def test_the_same_however_it_is_cut(fragments: list[str], is_open: bool, size: int) -> None:
    text = "".join(fragments)
    whole = split([text], is_open=is_open)
    assert split([text[i : i + size] for i in range(0, len(text), size)], is_open=is_open) == whole
    assert split(text, is_open=is_open) == whole
