"""How far a sequence has come through its pictures."""

from collections.abc import Sequence

from penstock.engine.encoding.features import Features
from penstock.protocol import Picture


class PictureCursor:
    """One sequence's pictures, by offset: those whose tokens are all computed, then those it holds features of."""

    __slots__ = ("held", "is_awaiting", "num_passed", "num_whole", "pictures", "salt")

    def __init__(self, pictures: Sequence[Picture], salt: str, num_whole: int = 0) -> None:
        self.pictures = pictures
        self.salt = salt
        self.num_whole = num_whole
        """Tokens, from the first on, that are read as one with all pictures among them; 0: each picture is by itself"""
        self.num_passed = 0
        self.held: list[Features] = []
        """Of the pictures that come next, in order"""
        self.is_awaiting = False
        """Whether it could go further, were the features of its next picture there"""

    @property
    def num_bytes(self) -> int:
        """Bytes of all pixels."""
        return sum(len(picture.pixels) for picture in self.pictures)

    @property
    def is_done(self) -> bool:
        """Whether nothing of a picture is left to compute."""
        return self.num_passed == len(self.pictures)

    def begin(self, num_computed: int) -> None:
        """Go to where ``num_computed`` tokens lead. Only while nothing is held."""
        assert not self.held, "features are held by who runs"
        self.num_passed = 0
        while not self.is_done and self.end_of_next <= num_computed:
            self.num_passed += 1

    @property
    def end_of_next(self) -> int:
        """Position behind what is read with the first picture that is not done."""
        return self.extent(self.pictures[self.num_passed])[1]

    def extent(self, picture: Picture) -> tuple[int, int]:
        """Return where what is read with a picture begins, and the position behind it."""
        return (0, self.num_whole) if self.num_whole else (picture.offset, picture.offset + picture.num_tokens)
