"""Every family's preparation of images against transformers' on Pillow."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from penstock.images.families import load_processor
from penstock.images.settings import read_seeing_files
from tests.seeing_models import SEEING, drawing, upstream_image_processor

SIZES = [(1, 1), (64, 64), (56, 56), (33, 20), (17, 90), (301, 64), (63, 257), (9, 400), (500, 11)]
"""Width and height"""


@pytest.mark.parametrize("family", SEEING)
@pytest.mark.parametrize("size", SIZES)
def test_normalized_pixels_equal_transformers(
    family: str, seeing_checkpoint: Callable[[str], Path], size: tuple[int, int]
) -> None:
    path = seeing_checkpoint(family)
    processor, files = load_processor(path), read_seeing_files(path)
    assert processor is not None
    assert files is not None
    image = drawing(*size)
    expected = np.asarray(upstream_image_processor(family)(image, return_tensors="np")["pixel_values"])
    expected = expected.reshape(-1, *expected.shape[-3:])
    normalization = files.image.normalization()
    found = np.concatenate([picture.pixels for picture in processor.image(image, "auto").pictures])
    assert found.dtype == np.uint8
    normalized = (found.astype(np.float32) * normalization.scale - normalization.mean) / normalization.std
    # The pixels are the same; what is left is the rounding of normalization.
    np.testing.assert_allclose(normalized.transpose(0, 3, 1, 2), expected, atol=1e-6)


def test_a_model_that_reads_text_sees_nothing(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    assert load_processor(tmp_path) is None
    assert load_processor(tmp_path / "model.gguf") is None


@pytest.mark.parametrize("family", SEEING)
def test_gray_images_come_as_rgb(family: str, seeing_checkpoint: Callable[[str], Path]) -> None:
    path = seeing_checkpoint(family)
    processor = load_processor(path)
    assert processor is not None
    picture = processor.image(Image.new("L", (40, 40), 90).convert("RGB"), "auto").pictures[0]
    assert {picture.pixels.shape[-1], *np.unique(np.ptp(picture.pixels, axis=-1))} == {3, 0}
