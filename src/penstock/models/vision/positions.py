"""Where tokens are on three axes, for families whose rotary positions are (time, row, column).

Wang et al., "Qwen2-VL" (2024), section 2.1: text moves along all three axes at once; a picture's tokens lie on its
grid, which begins where its first token would be as text; what follows begins one beyond the farthest of them on any
axis.
"""

from bisect import bisect_right
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from penstock.protocol import Picture


class RotaryPositions:
    """Positions of one sequence's tokens: a function of its pictures and of a token's index, and of nothing else.

    So they stay the same however a prompt is cut into steps, wherever its prefix came from, and when it is computed
    again. Immutable; a sequence without pictures has them too.
    """

    def __init__(self, pictures: Sequence[Picture]) -> None:
        """``pictures`` by offset; each has a grid."""
        self._pictures = tuple(pictures)
        self._ends: list[int] = []
        """Index of the first token after each picture"""
        self._offsets = [0]
        """What a token of text adds to its index, by how many pictures are before it"""
        for picture in self._pictures:
            num_frames, num_rows, num_columns = _grid(picture)
            assert picture.num_tokens == num_frames * num_rows * num_columns
            extent = max(int(_times(picture)[-1]) + 1, num_rows, num_columns)
            self._ends.append(picture.offset + picture.num_tokens)
            self._offsets.append(self._offsets[-1] + extent - picture.num_tokens)

    def offset(self, start: int, end: int) -> int | None:
        """Return what tokens [start, end) add to their index on all three axes; None where a picture is among them."""
        num_before = bisect_right(self._ends, start)
        if num_before < len(self._pictures) and self._pictures[num_before].offset < end:
            return None
        return self._offsets[num_before]

    def of(self, start: int, end: int) -> npt.NDArray[np.int64]:
        """Return the positions [3, end - start] of tokens [start, end), which need not exist yet."""
        indices = np.arange(start, end)
        num_before = np.searchsorted(self._ends, indices, side="right")
        positions = np.tile(indices + np.array(self._offsets)[num_before], (3, 1))
        for i in range(bisect_right(self._ends, start), len(self._pictures)):
            picture = self._pictures[i]
            if picture.offset >= end:
                break
            _, num_rows, num_columns = _grid(picture)
            inside = slice(max(picture.offset - start, 0), self._ends[i] - start)
            frames, places = np.divmod(indices[inside] - picture.offset, num_rows * num_columns)
            on_grid = np.stack((_times(picture)[frames], *np.divmod(places, num_columns)))
            positions[:, inside] = on_grid + picture.offset + self._offsets[i]
        return positions


def _grid(picture: Picture) -> tuple[int, int, int]:
    assert picture.grid is not None, "a family with three axes gives its pictures grids"
    return picture.grid


def _times(picture: Picture) -> npt.NDArray[np.int64]:
    """Return the positions in time of a picture's frames, from its own beginning; parts of one count for nothing."""
    # In float32, as the models were trained.
    return (np.arange(_grid(picture)[0], dtype=np.float32) * np.float32(picture.time_step)).astype(np.int64)
