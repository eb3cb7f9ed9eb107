"""How far tokens see where some see each other whatever their order."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from penstock.models.config import VisionConfig
from penstock.protocol import Picture

Extent = tuple[int, int]
"""The first of tokens that see each other, and the position behind the last"""


def seen_both_ways(vision: VisionConfig | None, pictures: Sequence[Picture], num_prompt_tokens: int) -> list[Extent]:
    """Return which tokens of a sequence that shows ``pictures`` see each other, in order."""
    if vision is None or not vision.sees_both_ways or not pictures:
        return []
    if vision.reads_prompts_whole:
        return [(0, num_prompt_tokens)]
    return [(picture.offset, picture.offset + picture.num_tokens) for picture in pictures]


def visible_tokens(extents: Sequence[Extent], start: int, end: int) -> npt.NDArray[np.int32]:
    """Return how many of their sequence's tokens those of [start, end) see; for ``BatchLayout.pack``.

    None of ``extents``, which are the sequence's, is cut by ``end``: all that is seen has to be there.
    """
    visible = np.arange(start + 1, end + 1, dtype=np.int32)
    for first, past in extents:
        if first < end and past > start:
            assert past <= end, "tokens that see each other are computed in one step"
            visible[max(first - start, 0) : past - start] = past
    return visible
