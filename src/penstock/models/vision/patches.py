"""From pictures' bytes to what a tower's first projection reads.

n pictures of one shape, each of F frames or tiles; P patch size.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from penstock.images.settings import Normalization
from penstock.protocol import Picture


class Patches:
    """Cuts pictures into patches and normalizes these."""

    def __init__(self, patch_size: int, normalization: Normalization, dtype: torch.dtype) -> None:
        """``dtype`` is that of activations."""
        self._patch_size = patch_size
        self._dtype = dtype
        self._scale = normalization.scale
        self._mean, self._std = (torch.tensor(values) for values in (normalization.mean, normalization.std))

    def __call__(self, pictures: Sequence[Picture]) -> Tensor:
        """Return [n * F * rows * columns, P * P * 3], picture by picture and row by row, colours innermost.

        What is too narrow for a patch, at the right and at the bottom, is left out.
        """
        P = self._patch_size
        F, height, width = pictures[0].shape
        rows, columns = height // P, width // P
        grids = [
            np.frombuffer(picture.pixels, np.uint8)
            .reshape(F, height, width, 3)[:, : rows * P, : columns * P]
            .reshape(F, rows, P, columns, P, 3)
            .swapaxes(2, 3)
            for picture in pictures
        ]
        # The copy puts each patch's pixels beside each other.
        together = np.stack(grids, out=np.empty((len(grids), F, rows, columns, P, P, 3), np.uint8))
        patches = torch.from_numpy(together).view(-1, 3)
        normalized = patches.float().mul_(self._scale).sub_(self._mean).div_(self._std)
        return normalized.view(-1, P * P * 3).to(self._dtype)


def by_shape(pictures: Sequence[Picture], encode: Callable[[list[Picture]], Sequence[Tensor]]) -> list[Tensor]:
    """Return what ``encode`` makes of each picture; those of one shape go to it together."""
    groups: dict[tuple[int, int, int], list[int]] = {}
    for index, picture in enumerate(pictures):
        groups.setdefault(picture.shape, []).append(index)
    results: dict[int, Tensor] = {}
    for indices in groups.values():
        results.update(zip(indices, encode([pictures[i] for i in indices]), strict=True))
    return [results[i] for i in range(len(pictures))]
