"""How Qwen2-VL and Qwen2.5-VL want images and videos, against transformers' processor on Pillow."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import transformers
from PIL.Image import Image

from penstock.errors import InvalidImage, ModelUnreadable
from penstock.images.families import load_processor
from penstock.images.processor import Expansion, Processor
from penstock.images.settings import read_seeing_files
from tests.seeing_models import THREE_AXES, drawing

SIZES = [
    (1, 1),
    (28, 28),
    (64, 64),
    (33, 20),
    (17, 90),
    (301, 64),
    (63, 257),
    (9, 400),
    (1000, 700),
    (3, 600),
    (90, 98),
]
"""Width and height"""
PIXELS = 28 * 28
"""Of a token"""


def processor_of(path: Path) -> Processor:
    processor = load_processor(path)
    assert processor is not None
    return processor


def checkpoint_with(path: Path, name: str = "Qwen2VL", **files: dict[str, Any]) -> Path:
    """Return a directory with these files, but no weights."""
    vision = {"patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2}
    config = {"architectures": [f"{name}ForConditionalGeneration"], "vision_config": vision}
    for file, values in {"config": config, "preprocessor_config": {}, **files}.items():
        (path / f"{file}.json").write_text(json.dumps(values))
    return path


def only_picture(expansion: Expansion) -> Any:
    (picture,) = expansion.pictures
    return picture


def in_patches(path: Path, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Return frames [F, height, width, 3] normalized and cut as transformers does."""
    files = read_seeing_files(path)
    assert files is not None
    normalization = files.image.normalization()
    frames = (pixels.astype(np.float32) * normalization.scale - normalization.mean) / normalization.std
    _, height, width, _ = frames.shape
    cut = np.repeat(frames, 2, axis=0).reshape(-1, 2, height // 28, 2, 14, width // 28, 2, 14, 3)
    return cut.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(-1, 3 * 2 * 14 * 14)


@pytest.mark.parametrize("family", THREE_AXES)
@pytest.mark.parametrize("size", SIZES)
def test_images_are_transformers(family: str, size: tuple[int, int], seeing_checkpoint: Callable[[str], Path]) -> None:
    path, image = seeing_checkpoint(family), drawing(*size)
    upstream = transformers.Qwen2VLImageProcessorPil(**THREE_AXES[family].image)(image, return_tensors="np")
    expansion = processor_of(path).image(image, "auto")
    picture = only_picture(expansion)
    times, rows, columns = picture.grid
    assert [[times, 2 * rows, 2 * columns]] == upstream["image_grid_thw"].tolist()
    np.testing.assert_allclose(in_patches(path, picture.pixels), upstream["pixel_values"], atol=2e-6)
    assert picture.num_tokens == times * rows * columns
    assert picture.size == size[::-1]
    assert expansion.text == "<|image_pad|>" * picture.num_tokens


def test_low_detail_takes_fewer_tokens(tmp_path: Path) -> None:
    processor = processor_of(checkpoint_with(tmp_path))
    large, small = drawing(1400, 900), drawing(300, 200)
    low, high, auto = (only_picture(processor.image(large, detail)) for detail in ("low", "high", "auto"))
    assert low.num_tokens * PIXELS <= 512 * 512 < high.num_tokens * PIXELS
    assert high.num_tokens == auto.num_tokens
    assert (
        only_picture(processor.image(small, "low")).num_tokens
        == only_picture(processor.image(small, "high")).num_tokens
    )


@pytest.mark.parametrize(
    ("settings", "most"),
    [
        ({}, 1280),
        ({"min_pixels": 4 * PIXELS, "max_pixels": 30 * PIXELS}, 30),
        ({"size": {"shortest_edge": 4 * PIXELS, "longest_edge": 31 * PIXELS}}, 31),
        ({"size": {"min_pixels": 4 * PIXELS, "max_pixels": 32 * PIXELS}}, 32),
        ({"size": None, "min_pixels": None, "max_pixels": 33 * PIXELS}, 33),
    ],
)
def test_bounds_are_read_from_files_of_any_age(settings: dict[str, Any], most: int, tmp_path: Path) -> None:
    processor = processor_of(checkpoint_with(tmp_path, preprocessor_config=settings))
    num_tokens = only_picture(processor.image(drawing(2000, 1900), "high")).num_tokens
    assert 0.7 * most <= num_tokens <= most


def test_settings_in_one_file_as_version_5_writes_them(tmp_path: Path) -> None:
    both = {
        "image_processor": {"max_pixels": 9 * PIXELS},
        "video_processor": {"min_pixels": 1, "max_pixels": 5 * PIXELS},
    }
    path = checkpoint_with(tmp_path, processor_config=both)
    (path / "preprocessor_config.json").unlink()
    processor = processor_of(path)
    assert only_picture(processor.image(drawing(300, 300), "auto")).grid == (1, 3, 3)
    assert only_picture(processor.video([drawing(300, 300)], 1.0)).grid == (1, 2, 2)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"patch_size": 16}, "patch_size is 16"),
        ({"do_resize": False}, "do_resize"),
        ({"min_pixels": "x"}, "min_pixels"),
    ],
)
def test_settings_that_cannot_be_honoured_are_refused(settings: dict[str, Any], complaint: str, tmp_path: Path) -> None:
    with pytest.raises(ModelUnreadable, match=complaint):
        load_processor(checkpoint_with(tmp_path, preprocessor_config=settings))


def test_images_too_elongated_are_refused(tmp_path: Path) -> None:
    processor = processor_of(checkpoint_with(tmp_path))
    with pytest.raises(InvalidImage, match="2 x 402 pixels is too elongated"):
        processor.image(drawing(2, 402), "auto")
    assert processor.image(drawing(2, 400), "auto").pictures


def video(num_frames: int, size: tuple[int, int] = (70, 50)) -> list[Image]:
    return [drawing(*size, seed=i) for i in range(num_frames)]


@pytest.mark.parametrize("family", THREE_AXES)
@pytest.mark.parametrize("num_frames", [1, 2, 5])
def test_frames_of_videos_are_prepared_like_images(
    family: str, num_frames: int, seeing_checkpoint: Callable[[str], Path]
) -> None:
    processor, frames = processor_of(seeing_checkpoint(family)), video(num_frames)
    expansion = processor.video(frames, 2.0)
    picture = only_picture(expansion)
    images = [only_picture(processor.image(frame, "auto")).pixels for frame in frames]
    np.testing.assert_array_equal(picture.pixels, np.concatenate(images))
    assert picture.grid == (-(-num_frames // 2), *picture.grid[1:])
    assert expansion.text == "<|video_pad|>" * picture.num_tokens
    # A pair of frames a second.
    assert picture.time_step == (2.0 if family == "qwen2.5-vl" else 1.0)


@pytest.mark.parametrize(
    ("num_frames", "frames_per_s", "taken", "seconds_each"),
    [
        (10, 5.0, [0, 2, 5, 7], 2 / 2.0),
        (30, 10.0, [0, 5, 10, 15, 20, 25], 2 / 2.0),
        (7, 30.0, [0, 1, 3, 5], 2 / (30 * 4 / 7)),
        (3, 2.0, [0, 1, 2], 2 / 2.0),
        (3, 0.5, [0, 1, 2], 2 / 0.5),
        (3, 24.0, [0, 1], 2 / (24 * 2 / 3)),
    ],
)
def test_two_frames_a_second_are_taken(
    num_frames: int, frames_per_s: float, taken: list[int], seconds_each: float, tmp_path: Path
) -> None:
    processor, frames = processor_of(checkpoint_with(tmp_path, "Qwen2_5_VL")), video(num_frames)
    picture = only_picture(processor.video(frames, frames_per_s))
    alone = [only_picture(processor.video([frames[i]], 1.0)).pixels for i in taken]
    np.testing.assert_array_equal(picture.pixels, np.concatenate(alone))
    assert picture.time_step == pytest.approx(4 * seconds_each)  # tokens a second that Qwen2.5-VL has by default


def test_long_videos_have_smaller_frames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = checkpoint_with(tmp_path, video_preprocessor_config={"min_pixels": PIXELS, "max_pixels": 30 * PIXELS})
    processor, frames = processor_of(path), video(2, (300, 250)) * 10
    whole = only_picture(processor.video(frames, 2.0))
    assert 200 < whole.num_tokens <= 300
    monkeypatch.setattr("penstock.images.families.qwen2_vl._VIDEO_TOKENS", 100)
    bounded = only_picture(processor.video(frames, 2.0))
    assert 50 < bounded.num_tokens <= 100
    assert len(bounded.pixels) == 20
    assert only_picture(processor.video(frames[:6], 2.0)).grid[1:] == whole.grid[1:]
