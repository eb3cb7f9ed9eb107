"""Drawings and the questions about them: repeatable, and two splits that share nothing."""

from collections import Counter
from itertools import combinations

import numpy as np
import pytest

from penstock.eval.sets.drawings import (
    ANSWERS,
    COLOURS,
    DIGITS,
    HELD_OUT_PHRASINGS,
    MAX_COUNT,
    PHRASINGS,
    PLACES,
    SHAPES,
    SIDE,
    WORDS,
    Drawing,
    Part,
    Split,
    draw,
    held_out_colour,
    place_of,
)

THINGS = {"scene": SHAPES, "count": SHAPES, "digit": DIGITS, "word": WORDS}


def held_out_of(drawing: Drawing) -> list[tuple[str, str]]:
    """For each thing of a drawing, a word being one, its colour and the one held out for it there."""
    things, parts = THINGS[drawing.picture], drawing.parts
    if drawing.picture == "count":
        return [(parts[0].colour, held_out_colour(things.index(parts[0].name), len(parts)))]
    if drawing.picture == "word":
        box = (parts[0].box[0], parts[0].box[1], parts[-1].box[2], parts[-1].box[3])
        parts = (Part("".join(part.name for part in parts), parts[0].colour, box),)
    where = [PLACES.index(place_of(part.box)) for part in parts]
    return [(part.colour, held_out_colour(things.index(part.name), at)) for part, at in zip(parts, where, strict=True)]


@pytest.fixture(scope="module")
def drawings() -> dict[Split, list[Drawing]]:
    return {
        "training": [draw("training", n) for n in range(300)],
        "held_out": [draw("held_out", n) for n in range(300)],
    }


def test_the_same_number_is_the_same_drawing() -> None:
    one, again, other = draw("training", 7), draw("training", 7), draw("training", 8)
    assert one.image.tobytes() == again.image.tobytes()
    assert (one.parts, one.questions) == (again.parts, again.questions)
    assert one.image.tobytes() != other.image.tobytes()
    assert one.image.size == (SIDE, SIDE)


def test_a_held_out_thing_has_a_colour_it_never_has_there_in_training(drawings: dict[Split, list[Drawing]]) -> None:
    for split, of_split in drawings.items():
        for drawing in of_split:
            assert all((colour == own) == (split == "held_out") for colour, own in held_out_of(drawing))


def test_every_answer_is_trained_on_and_asked_for(drawings: dict[Split, list[Drawing]]) -> None:
    for of_split in drawings.values():
        answers = {(asked.kind, asked.answer) for drawing in of_split for asked in drawing.questions}
        known = {(kind, answer) for kind, possible in ANSWERS.items() for answer in possible}
        assert answers <= known
        assert all(pair in answers for pair in known if pair[0] != "word")


def test_questions_are_true_of_the_parts(drawings: dict[Split, list[Drawing]]) -> None:
    for drawing in drawings["training"]:
        for asked in drawing.questions:
            if asked.kind == "count":
                assert len(drawing.parts) == int(asked.answer) <= MAX_COUNT
            elif asked.kind in ("digit", "word"):
                assert "".join(part.name for part in drawing.parts) == asked.answer
            elif asked.kind == "shape":
                named = [part for part in drawing.parts if part.colour in asked.text] or list(drawing.parts)
                assert [part.name for part in named] == [asked.answer]
            elif asked.kind == "colour":
                named = [part for part in drawing.parts if part.name in asked.text] or list(drawing.parts)
                assert {part.colour for part in named} == {asked.answer}


def test_parts_are_visible_and_do_not_overlap(drawings: dict[Split, list[Drawing]]) -> None:
    for drawing in drawings["training"]:
        pixels = np.asarray(drawing.image, dtype=float)
        background = pixels[-1, 0]
        for part in drawing.parts:
            left, top, right, bottom = (round(edge) for edge in part.box)
            assert 0 <= left < right <= SIDE
            assert 0 <= top < bottom <= SIDE
            inside = np.linalg.norm(pixels[top:bottom, left:right] - background, axis=-1)
            assert inside.max() > 100
            assert np.linalg.norm(pixels[tuple(inside_of(inside, top, left))] - COLOURS[part.colour]) < 30
        boxes = [part.box for part in drawing.parts]
        for a, b in combinations(boxes, 2):
            # Letters stand side by side; their boxes may touch by the width of an edge.
            assert max(b[0] - a[2], a[0] - b[2], b[1] - a[3], a[1] - b[3]) > -1


def inside_of(distances: np.ndarray, top: int, left: int) -> tuple[int, int]:
    """The row and column in the drawing of the pixel that differs most from the background."""
    row, column = np.unravel_index(int(distances.argmax()), distances.shape)
    return top + int(row), left + int(column)


def test_held_out_words_are_in_no_training_question() -> None:
    assert HELD_OUT_PHRASINGS.keys() == PHRASINGS.keys()
    for name, phrasings in PHRASINGS.items():
        assert HELD_OUT_PHRASINGS[name] not in phrasings
        assert all(times == 1 for times in Counter(phrasings).values())
