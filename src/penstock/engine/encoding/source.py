"""Where pictures become features: in this process or in others."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from penstock.errors import PenstockError
from penstock.protocol import Picture

FeatureRows = npt.NDArray[np.float32]
"""[K, E] of K placeholder tokens"""
FEATURE_ELEMENT_BYTES = 4


class Encoded(NamedTuple):
    """What became of one picture."""

    feature_id: int
    features: FeatureRows | PenstockError


@dataclass(slots=True)
class EncoderCounters:
    """Totals since the start."""

    num_pictures: int = 0
    num_tokens: int = 0
    """Placeholder tokens of those"""
    seconds: float = 0.0
    """Spent on them; several encoders' are added up"""
    num_workers: int = 0
    """Processes that encode; 0: the engine's does"""
    num_ready_workers: int = 0
    num_restarts: int = 0


class FeatureSource(Protocol):
    """One or more encoders of a model."""

    counters: EncoderCounters

    def cost(self, picture: Picture) -> float:
        """Return how much of a step's budget encoding a picture takes; above 1, it takes several steps'."""

    def submit(self, work: Sequence[tuple[int, Picture]]) -> None:
        """Take pictures, with the ids of their features.

        Where it is here that they are encoded, returns when those are that cost no more than 1. Of those that cost
        more, each call does what these leave of a step's budget.
        """

    @property
    def is_behind(self) -> bool:
        """Whether ``submit``, of nothing too, would go on with a picture."""

    def cancel(self, feature_id: int) -> bool:
        """Give a picture up that nobody waits for; False, and it goes on, where that cannot be."""

    def take(self) -> list[Encoded]:
        """Return what has been encoded, or has failed, since this was last asked."""

    @property
    def has_news(self) -> bool:
        """Whether ``take`` would return something."""

    def on_news(self, wake: Callable[[], object]) -> None:
        """Have ``wake`` called, on any thread, when ``has_news`` has become true by itself."""

    def close(self) -> None:
        """End what belongs to it."""
