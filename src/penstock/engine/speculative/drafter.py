"""What speculation asks of whoever guesses."""

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Protocol

from penstock.engine.request import Sequence


@dataclass(slots=True, frozen=True)
class Offer:
    """A guess that could be made at what follows a sequence."""

    sequence: Sequence
    most: int
    """Tokens it could have, at least 1"""
    grade: int = 0
    """How good the ground for it is: guesses of one grade come true about equally often"""
    source: int = 0
    """Where in the sequence's tokens a lookup found it"""


class Drafter(Protocol):
    """Guesses in two steps, so that only what will be tried is worked out."""

    def offer(self, sequence: Sequence, most: int) -> Offer | None:
        """Return what could be guessed of a decoding sequence, at most ``most`` tokens; None if nothing."""

    def draft(self, chosen: SequenceOf[tuple[Offer, int]]) -> list[list[int]]:
        """Return the guesses of that many tokens each; fewer where there is no room to work them out."""

    def remove(self, sequence_id: int) -> None:
        """Forget a sequence; unknown ones are ignored."""
