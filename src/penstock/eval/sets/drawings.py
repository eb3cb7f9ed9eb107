"""Drawings made from a number, and questions about them: shapes, colours, places, counts, digits and short words.

Nothing is read but the typeface inside Pillow, so every machine has them. Two splits never share a drawing: a shape,
digit or word in one part of the drawing has a colour in which it is drawn there for ``held_out`` only, and no other in
that split. What is asked about a held-out drawing is then read off a combination that was never trained on, while every
thing was seen in every colour and in every place. One phrasing of each kind is held out too.
"""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

from PIL import Image, ImageDraw, ImageFont

Split = Literal["training", "held_out"]
Picture = Literal["scene", "count", "digit", "word"]
Kind = Literal["shape", "colour", "position", "count", "digit", "word"]
"""What is asked about"""

SIDE = 256
"""Width and height of a drawing in pixels"""

Rgb = tuple[int, int, int]
COLOURS: dict[str, Rgb] = {
    "red": (220, 30, 30),
    "green": (30, 160, 60),
    "blue": (30, 70, 220),
    "yellow": (245, 225, 40),
    "orange": (250, 140, 20),
    "purple": (140, 40, 170),
    "black": (15, 15, 15),
    "brown": (130, 75, 30),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "diamond")
PLACES = (
    *("top left", "top", "top right"),
    *("left", "centre", "right"),
    *("bottom left", "bottom", "bottom right"),
)
"""The nine parts of a drawing, row by row"""
MAX_COUNT = 6
DIGITS = tuple("0123456789")
WORDS = (
    *("ant", "bag", "bed", "bell", "bird", "book", "box", "bus", "cake", "car", "cat", "city", "coin"),
    *("cow", "cup", "desk", "dog", "door", "drum", "farm", "fire", "fish", "fork", "fox", "gate", "gold"),
    *("hand", "hat", "hill", "home", "ice", "key", "king", "lamp", "lion", "map", "milk", "moon", "nest"),
    *("open", "park", "pear", "pen", "pig", "pool", "rain", "ring", "road", "rock", "rose", "salt", "sand"),
    *("ship", "snow", "sock", "star", "stop", "sun", "tent", "tree", "van", "wind", "wolf", "zoo"),
)

ANSWERS: dict[Kind, tuple[str, ...]] = {
    "shape": SHAPES,
    "colour": tuple(COLOURS),
    "position": PLACES,
    "count": tuple(str(number) for number in range(1, MAX_COUNT + 1)),
    "digit": DIGITS,
    "word": WORDS,
}
"""Every answer that a question of a kind can have"""

PHRASINGS: dict[str, tuple[str, ...]] = {
    "shape": ("What shape is this?", "Which shape do you see?", "Name the shape.", "What is the shape called?"),
    "shape of a colour": (
        "What shape is {colour}?",
        "Which shape is {colour}?",
        "Name the {colour} shape.",
        "What is the {colour} shape called?",
    ),
    "colour": (
        "What colour is the {thing}?",
        "What color is the {thing}?",
        "Which colour does the {thing} have?",
        "Name the colour of the {thing}.",
    ),
    "position": (
        "Where is the {thing}?",
        "Where do you see the {thing}?",
        "In which part is the {thing}?",
        "Where was the {thing} drawn?",
    ),
    "count": (
        "How many {thing}s are there?",
        "How many {thing}s do you see?",
        "Count the {thing}s.",
        "How many shapes are there?",
    ),
    "digit": ("Which digit is this?", "What number is this?", "Read the digit.", "What digit do you see?"),
    "word": ("What does it say?", "Which word is this?", "Read the word.", "What is written here?"),
}
HELD_OUT_PHRASINGS: dict[str, str] = {
    "shape": "Which shape is this?",
    "shape of a colour": "Which of the shapes is {colour}?",
    "colour": "Which colour is the {thing}?",
    "position": "In which part do you see the {thing}?",
    "count": "What is the number of {thing}s?",
    "digit": "Which digit do you see?",
    "word": "Which word is written here?",
}
"""In words that penstock-mini was never asked in."""


@dataclass(frozen=True, slots=True)
class Part:
    """One shape, digit or letter of a drawing."""

    name: str
    colour: str
    box: tuple[float, float, float, float]
    """Left, top, right and bottom in pixels"""


@dataclass(frozen=True, slots=True)
class Asked:
    """A question about a drawing and its one right answer."""

    kind: Kind
    phrasing: str
    """The key of its wordings in ``PHRASINGS``"""
    about: Mapping[str, str]
    """What fills the gaps of a wording"""
    text: str
    answer: str

    @property
    def held_out_text(self) -> str:
        """The question in held-out words."""
        return HELD_OUT_PHRASINGS[self.phrasing].format(**self.about)


@dataclass(frozen=True, slots=True)
class Drawing:
    """An image with all that is known about it."""

    image: Image.Image
    """RGB, ``SIDE`` by ``SIDE``"""
    picture: Picture
    parts: tuple[Part, ...]
    questions: tuple[Asked, ...]
    """At least one; of several kinds where the drawing has them"""


def draw(split: Split, number: int, picture: Picture | None = None) -> Drawing:
    """Return the drawing of that number in its split, the same each time; ``picture`` says what is to be drawn."""
    draws = random.Random(f"{split} drawing {number} of {picture}")
    what = draws.choice(_OFTEN) if picture is None else picture
    return _DRAWERS[what](split, draws)


def held_out_colour(index: int, where: int) -> str:
    """Return the colour that is held out for a thing, by its index among shapes, digits or words, in a place.

    ``where`` is the place's index, or the number of shapes where they are counted.
    """
    return tuple(COLOURS)[(index + where) % len(COLOURS)]


def place_of(box: tuple[float, float, float, float]) -> str:
    """Return the part of the drawing where a box has its centre."""
    column, row = (int((low + high) / 2 * 3 // SIDE) for low, high in ((box[0], box[2]), (box[1], box[3])))
    return PLACES[row * 3 + column]


def _colour(split: Split, index: int, where: int, draws: random.Random, taken: Sequence[str] = ()) -> str:
    own = held_out_colour(index, where)
    if split == "held_out":
        return own
    return draws.choice([name for name in COLOURS if name != own and name not in taken])


def _scene(split: Split, draws: random.Random) -> Drawing:
    """One or two shapes of different kind and colour, each in its place."""
    names = draws.sample(SHAPES, draws.choice((1, 2)))
    colours: list[str] = []
    while len(set(colours)) < len(names):  # held-out colours follow from the places, and may be the same
        places = draws.sample(range(9), len(names))
        colours = []
        for name, place in zip(names, places, strict=True):
            colours.append(_colour(split, SHAPES.index(name), place, draws, colours))
    paint = _Paint(colours, draws)
    cell = SIDE / 3
    # Two shapes are too small, and too near the middle of their parts, to overlap.
    least, most, aside = (0.34, 0.5, 0.22) if len(names) == 1 else (0.3, 0.4, 0.1)
    for name, place, colour in zip(names, places, colours, strict=True):
        row, column = divmod(place, 3)
        radius = draws.uniform(least, most) * cell
        # The centre stays well inside its part, and the shape inside the drawing.
        x, y = (
            min(max((part + 0.5 + draws.uniform(-aside, aside)) * cell, radius + 2), SIDE - radius - 2)
            for part in (column, row)
        )
        paint.shape(name, colour, x, y, radius)
    questions: list[Asked] = []
    for part in paint.parts:
        about = {"thing": part.name, "colour": part.colour}
        questions.append(_ask("shape" if len(names) == 1 else "shape of a colour", "shape", part.name, about, draws))
        questions.append(_ask("colour", "colour", part.colour, about, draws))
        questions.append(_ask("position", "position", place_of(part.box), about, draws))
    return paint.drawing("scene", questions)


def _count(split: Split, draws: random.Random) -> Drawing:
    """One to six shapes of one kind and colour."""
    index = draws.randrange(len(SHAPES))
    number = draws.randint(1, MAX_COUNT)
    colour = _colour(split, index, number, draws)
    paint = _Paint([colour], draws)
    cell = SIDE / 3
    for place in draws.sample(range(9), number):
        row, column = divmod(place, 3)
        radius = draws.uniform(0.27, 0.36) * cell
        x, y = ((part + 0.5 + draws.uniform(-0.1, 0.1)) * cell for part in (column, row))
        paint.shape(SHAPES[index], colour, x, y, radius)
    return paint.drawing("count", [_ask("count", "count", str(number), {"thing": SHAPES[index]}, draws)])


def _digit(split: Split, draws: random.Random) -> Drawing:
    """One digit."""
    return _text(split, draws, "digit", DIGITS, draws.randint(140, 210))


def _word(split: Split, draws: random.Random) -> Drawing:
    """One short word."""
    return _text(split, draws, "word", WORDS, draws.randint(88, 108))


def _text(
    split: Split, draws: random.Random, kind: Literal["digit", "word"], texts: Sequence[str], size: int
) -> Drawing:
    index, stroke = draws.randrange(len(texts)), draws.choice((0, 0, 2, 3))
    text, room = texts[index], SIDE - 16 - 2 * stroke
    font = _font(min(size, int(size * room / _font(size).getlength(text))))
    left, top, right, bottom = font.getbbox(text, stroke_width=stroke)
    x = draws.uniform(4, SIDE - 4 - (right - left)) - left
    y = draws.uniform(4, SIDE - 4 - (bottom - top)) - top
    place = place_of((x, y + top, x + font.getlength(text), y + bottom))
    colour = _colour(split, index, PLACES.index(place), draws)
    paint = _Paint([colour], draws)
    paint.text(text, colour, x, y, font, stroke)
    return paint.drawing(
        kind,
        [
            _ask(kind, kind, texts[index], {}, draws),
            _ask("colour", "colour", colour, {"thing": kind}, draws),
        ],
    )


_DRAWERS: dict[Picture, Callable[[Split, random.Random], Drawing]] = {
    "scene": _scene,
    "count": _count,
    "digit": _digit,
    "word": _word,
}
_OFTEN: tuple[Picture, ...] = ("scene", "scene", "count", "digit", "word", "word")
"""Drawn as often as they stand here: there are more words than digits"""


def _ask(phrasing: str, kind: Kind, answer: str, about: dict[str, str], draws: random.Random) -> Asked:
    return Asked(kind, phrasing, about, draws.choice(PHRASINGS[phrasing]).format(**about), answer)


class _Paint:
    """Pale paper, and the parts put on it so far."""

    def __init__(self, colours: Sequence[str], draws: random.Random) -> None:
        self.draws = draws
        self.parts: list[Part] = []
        self._shades = {name: tuple(_near(value, 12, draws) for value in COLOURS[name]) for name in colours}
        paper = tuple(draws.randint(205, 255) for _ in range(3))
        self._image = Image.new("RGB", (SIDE, SIDE), paper)
        self._pen = ImageDraw.Draw(self._image)

    def drawing(self, picture: Picture, questions: Sequence[Asked]) -> Drawing:
        """Return what was painted."""
        return Drawing(self._image, picture, tuple(self.parts), tuple(questions))

    def shape(self, name: str, colour: str, x: float, y: float, radius: float) -> None:
        """Paint a shape around a point, a little turned."""
        shade = self._shades[colour]
        box = (x - radius, y - radius, x + radius, y + radius)
        turn = math.radians(self.draws.uniform(-10, 10))
        if name == "circle":
            self._pen.ellipse(box, fill=shade)
        elif name == "ring":
            self._pen.ellipse(box, outline=shade, width=round(radius * 0.36))
        elif name == "cross":
            for angle in (math.pi / 4, 3 * math.pi / 4):
                self._pen.polygon(_bar(x, y, radius, angle + turn), fill=shade)
        else:
            self._pen.polygon([_around(x, y, radius * r, a + turn) for r, a in _CORNERS[name]], fill=shade)
        self.parts.append(Part(name, colour, box))

    def text(self, text: str, colour: str, x: float, y: float, font: ImageFont.FreeTypeFont, stroke: int) -> None:
        """Paint letters or digits from a point on, which may lie outside of what is painted."""
        self._pen.text((x, y), text, font=font, fill=self._shades[colour], stroke_width=stroke)
        _, top, _, bottom = font.getbbox(text, stroke_width=stroke)
        for i, letter in enumerate(text):
            start, end = font.getlength(text[:i]), font.getlength(text[: i + 1])
            self.parts.append(Part(letter, colour, (x + start, y + top, x + end, y + bottom)))


def _polygon(num_corners: int, first: float, radii: Sequence[float]) -> list[tuple[float, float]]:
    return [(radii[i % len(radii)], first + 2 * math.pi * i / num_corners) for i in range(num_corners)]


_CORNERS = {
    "square": _polygon(4, math.pi / 4, (1.15,)),
    "diamond": _polygon(4, 0.0, (1.0, 0.7)),
    "triangle": _polygon(3, -math.pi / 2, (1.1,)),
    "star": _polygon(10, -math.pi / 2, (1.1, 0.45)),
}
"""Each corner's distance from the centre, in radii, and its angle"""


def _around(x: float, y: float, radius: float, angle: float) -> tuple[float, float]:
    return x + radius * math.cos(angle), y + radius * math.sin(angle)


def _bar(x: float, y: float, radius: float, angle: float) -> list[tuple[float, float]]:
    """A long narrow rectangle through a point."""
    return [_around(x, y, radius, angle + corner) for corner in (-0.22, 0.22, math.pi - 0.22, math.pi + 0.22)]


def _near(value: int, most: int, draws: random.Random) -> int:
    return min(255, max(0, value + draws.randint(-most, most)))


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont), "Pillow was built without FreeType"
    return font
