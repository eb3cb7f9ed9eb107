"""Rotary positions on three axes, against transformers' and the paper's rule."""

from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.models.vision import RotaryPositions
from penstock.protocol import Picture

MERGE = 2
TOKENS_PER_S = 4


def picture(offset: int, grid: tuple[int, int, int], time_step: float = 1.0) -> Picture:
    num_tokens = grid[0] * grid[1] * grid[2]
    return Picture(
        key=b"",
        offset=offset,
        num_tokens=num_tokens,
        pixels=b"",
        shape=(1, 1, 1),
        size=(1, 1),
        grid=grid,
        time_step=time_step,
    )


@lru_cache
def upstream(name: str) -> Any:
    """Return an object with transformers' ``get_rope_index``."""
    model = getattr(transformers, f"{name}Model")
    config = getattr(transformers, f"{name}Config")()
    config.vision_config.spatial_merge_size = MERGE
    config.vision_config.tokens_per_second = TOKENS_PER_S
    owner = object.__new__(model)
    torch.nn.Module.__init__(owner)
    owner.config = config
    return owner


def expected_positions(name: str, parts: list[int | tuple[int, int, int]], seconds: float) -> tuple[np.ndarray, int]:
    """Return transformers' [3, T] of runs of text and grids, videos if of several frames; and of the token after."""
    kinds: list[int] = []
    images: list[list[int]] = []
    videos: list[list[int]] = []
    for part in parts:
        if isinstance(part, int):
            kinds += [0] * part
        else:
            frames, rows, columns = part
            (images if frames == 1 else videos).append([frames, rows * MERGE, columns * MERGE])
            kinds += [1 if frames == 1 else 2] * (frames * rows * columns)
    positions, delta = upstream(name).get_rope_index(
        torch.zeros(1, len(kinds), dtype=torch.int64),
        mm_token_type_ids=torch.tensor([kinds]),
        image_grid_thw=torch.tensor(images) if images else None,
        video_grid_thw=torch.tensor(videos) if videos else None,
        second_per_grid_ts=[seconds] * len(videos) if name == "Qwen2_5_VL" else None,
    )
    return positions[:, 0].numpy(), len(kinds) + int(delta)


def placed(parts: list[int | tuple[int, int, int]], time_step: float) -> tuple[list[Picture], int]:
    """Return the pictures of such a prompt and its length."""
    pictures, index = [], 0
    for part in parts:
        if isinstance(part, int):
            index += part
        else:
            pictures.append(picture(index, part, 1.0 if part[0] == 1 else time_step))
            index += pictures[-1].num_tokens
    return pictures, index


MIXES: list[list[int | tuple[int, int, int]]] = [
    [7],
    [5, (1, 3, 4), 6],
    [(1, 6, 2)],
    [1, (1, 2, 2), 1, (1, 8, 3), 9, (3, 9, 4), 2],
    [4, (2, 7, 9), 1, (1, 1, 1), 3, (3, 12, 5), 1],
]


@pytest.mark.parametrize("parts", MIXES)
@pytest.mark.parametrize(("name", "seconds"), [("Qwen2VL", 0.25), ("Qwen2_5_VL", 1.0), ("Qwen2_5_VL", 0.6)])
def test_they_are_those_of_transformers(name: str, seconds: float, parts: list[int | tuple[int, int, int]]) -> None:
    expected, following = expected_positions(name, parts, seconds)
    pictures, length = placed(parts, TOKENS_PER_S * seconds)
    positions = RotaryPositions(pictures)
    np.testing.assert_array_equal(positions.of(0, length), expected)
    np.testing.assert_array_equal(positions.of(length, length + 2), [[following, following + 1]] * 3)


def test_text_after_a_video_begins_beyond_its_last_frame() -> None:
    # The authors' example: three frames, fifty positions apart, of two rows and two columns.
    positions = RotaryPositions([picture(0, (3, 2, 2), time_step=50.0)])
    time = [0, 0, 0, 0, 50, 50, 50, 50, 100, 100, 100, 100, 101, 102]
    assert positions.of(0, 14)[0].tolist() == time
    assert positions.of(0, 14)[1].tolist() == [0, 0, 1, 1] * 3 + [101, 102]
    assert positions.of(0, 14)[2].tolist() == [0, 1, 0, 1] * 3 + [101, 102]


GRIDS = st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 5))


@given(st.lists(st.one_of(st.integers(1, 6), GRIDS), max_size=6), st.floats(0.1, 9.0), st.data())
@settings(deadline=None)
def test_a_part_has_the_positions_of_the_whole(parts: list[Any], time_step: float, data: st.DataObject) -> None:
    pictures, length = placed(parts, time_step)
    positions = RotaryPositions(pictures)
    whole = positions.of(0, length + 5)
    start = data.draw(st.integers(0, length + 4))
    end = data.draw(st.integers(start + 1, length + 5))
    np.testing.assert_array_equal(positions.of(start, end), whole[:, start:end])
    offset = positions.offset(start, end)
    assert (offset is None) == any(p.offset < end and start < p.offset + p.num_tokens for p in pictures)
    if offset is not None:
        np.testing.assert_array_equal(positions.of(start, end), [np.arange(start, end) + offset] * 3)
