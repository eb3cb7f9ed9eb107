"""How far tokens see where a picture's see each other whatever their order."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from penstock.protocol import Picture


def visible_tokens(pictures: Sequence[Picture], start: int, end: int) -> npt.NDArray[np.int32]:
    """Return how many of their sequence's tokens those of [start, end) see; for ``BatchLayout.pack``.

    ``pictures`` are the sequence's, and none is cut by ``end``: all that is seen has to be there.
    """
    visible = np.arange(start + 1, end + 1, dtype=np.int32)
    for picture in pictures:
        past = picture.offset + picture.num_tokens
        if picture.offset < end and past > start:
            assert past <= end, "a picture's tokens are computed in one step"
            visible[max(picture.offset - start, 0) : past - start] = past
    return visible
