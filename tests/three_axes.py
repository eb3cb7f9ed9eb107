"""Prompts with images and videos for tiny models of three axes, and what transformers takes for them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor

from penstock.images.families import load_processor
from penstock.images.settings import read_seeing_files
from penstock.protocol import Picture
from tests.seeing_models import FRAMES_PER_S, drawing, token_ids_of, upstream_model, with_images

PATCH, MERGE = 14, 2
SEEN: list[Image | list[Image]] = [
    *(drawing(*size, seed=i) for i, size in enumerate([(90, 60), (30, 300), (90, 60), (200, 130)])),
    [drawing(80, 57, seed=20 + i) for i in range(4)],
    drawing(56, 56, seed=9),
    [drawing(100, 64, seed=30 + i) for i in range(3)],
]
"""Images of several sizes, two of them alike, and videos of an even and of an odd number of frames"""
TEXT = "Is @ like @@ or @?\nIn @ and @ and @ I see".replace("@", "<|vision_start|>@<|vision_end|>")


@dataclass(frozen=True)
class Prompt:
    """Tokens and pictures."""

    path: Path
    token_ids: list[int]
    pictures: list[Picture]

    def upstream(self) -> dict[str, Any]:
        """Return what transformers' model takes for it."""
        (image_id,) = token_ids_of(self.path, "<|image_pad|>")
        kinds = torch.zeros(1, len(self.token_ids), dtype=torch.int32)
        inputs: dict[str, Any] = {"input_ids": torch.tensor([self.token_ids]), "mm_token_type_ids": kinds}
        names = {1: ("pixel_values", "image_grid_thw"), 2: ("pixel_values_videos", "video_grid_thw")}
        for kind, (pixels, grids) in names.items():
            some = [p for p in self.pictures if (self.token_ids[p.offset] == image_id) == (kind == 1)]
            inputs[pixels] = torch.cat([self._patches(picture) for picture in some])
            inputs[grids] = torch.tensor([(t, rows * MERGE, columns * MERGE) for t, rows, columns in map(grid, some)])
            for picture in some:
                kinds[0, picture.offset : picture.offset + picture.num_tokens] = kind
            if kind == 2 and upstream_model(self.path).config.model_type == "qwen2_5_vl":
                inputs["second_per_grid_ts"] = [2 / FRAMES_PER_S] * len(some)
        return inputs

    def _patches(self, picture: Picture) -> Tensor:
        """Return what transformers' processors make of its pixels, [patches, colours * frames * height * width]."""
        files = read_seeing_files(self.path)
        assert files is not None
        normalization = files.image.normalization()
        pixels = torch.from_numpy(np.frombuffer(picture.pixels, np.uint8).reshape(*picture.shape, 3).copy())
        frames = (pixels * normalization.scale - torch.tensor(normalization.mean)) / torch.tensor(normalization.std)
        if len(frames) % 2:
            frames = torch.cat((frames, frames[-1:]))
        times, rows, columns = grid(picture)
        cut = frames.permute(0, 3, 1, 2).reshape(times, 2, 3, rows, MERGE, PATCH, columns, MERGE, PATCH)
        return cut.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(picture.num_tokens * MERGE**2, -1)


def grid(picture: Picture) -> tuple[int, int, int]:
    assert picture.grid is not None
    return picture.grid


def prompt(path: Path) -> Prompt:
    processor = load_processor(path)
    assert processor is not None
    return Prompt(path, *with_images(path, processor, TEXT, SEEN))
