"""From pictures' bytes to what a tower's first projection reads.

F frames or tiles of a picture, P patch size, N patches, K values of a patch.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from penstock.images.settings import Normalization
from penstock.protocol import Picture


def cut_patches(pictures: Sequence[Picture], patch_size: int) -> Tensor:
    """Return [sum of F * rows * columns, P * P * 3] uint8, picture by picture and row by row, colours innermost.

    Pictures have one height and width. What is too narrow for a patch, at the right and at the bottom, is left out.
    """
    P = patch_size
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


class Normalizer:
    """Brings patches to what a tower reads: (v * scale - mean) / std, rounded at each step as it was in training."""

    def __init__(self, normalization: Normalization, num_pixels: int, dtype: torch.dtype) -> None:
        """``num_pixels`` are those of a patch, in all its frames; ``dtype`` is that of activations."""
        # As long as a patch: passes over colours in groups of three take several times as long.
        self._mean = torch.tensor(normalization.mean * num_pixels)
        self._std = torch.tensor(normalization.std * num_pixels)
        self._scale = normalization.scale
        self._dtype = dtype

    def __call__(self, patches: Tensor) -> Tensor:
        """Return [N, K] from as many uint8, colours innermost."""
        x = patches.to(torch.float32).mul_(self._scale).sub_(self._mean).div_(self._std)
        return x.to(self._dtype)
