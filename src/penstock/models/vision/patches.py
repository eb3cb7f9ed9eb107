"""From pictures' bytes to what a tower's first projection reads.

F frames or tiles of a picture, P patch size.
"""

from collections.abc import Sequence

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

    def cut(self, pictures: Sequence[Picture]) -> Tensor:
        """Return [sum of F * rows * columns, P * P * 3] uint8, picture by picture and row by row, colours innermost.

        Pictures have one height and width. What is too narrow for a patch, at the right and at the bottom, is left out.
        """
        P = self._patch_size
        _, height, width = pictures[0].shape
        rows, columns = height // P, width // P
        grids = [
            np.frombuffer(picture.pixels, np.uint8)
            .reshape(-1, height, width, 3)[:, : rows * P, : columns * P]
            .reshape(-1, rows, P, columns, P, 3)
            .swapaxes(2, 3)
            for picture in pictures
        ]
        # The copy puts each patch's pixels beside each other.
        num_frames = sum(picture.shape[0] for picture in pictures)
        together = np.concatenate(grids, out=np.empty((num_frames, rows, columns, P, P, 3), np.uint8))
        return torch.from_numpy(together).view(-1, P * P * 3)

    def normalize(self, patches: Tensor) -> Tensor:
        """Return [N, P * P * 3] as a tower reads it, from as many uint8."""
        normalized = patches.view(-1, 3).float().mul_(self._scale).sub_(self._mean).div_(self._std)
        return normalized.view(patches.shape).to(self._dtype)
