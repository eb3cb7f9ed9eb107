"""Every family's preparation of images against transformers' on Pillow."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from transformers.models.gemma3.processing_gemma3 import Gemma3Processor
from transformers.models.smolvlm.processing_smolvlm import get_image_prompt_string

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


@pytest.mark.parametrize("size", SIZES)
def test_tiles_are_named_as_transformers_names_them(
    size: tuple[int, int], seeing_checkpoint: Callable[[str], Path]
) -> None:
    processor = load_processor(seeing_checkpoint("smolvlm"))
    assert processor is not None
    image = drawing(*size)
    split = upstream_image_processor("smolvlm")(image, return_row_col_info=True)
    (rows,), (columns,) = split["rows"][0], split["cols"][0]
    expansion = processor.image(image, "auto")
    num_tokens = expansion.pictures[0].num_tokens
    expected = get_image_prompt_string(
        rows, columns, num_tokens, "<fake_token_around_image>", "<image>", "<global-img>"
    )
    assert expansion.text == expected


def test_crops_are_told_as_transformers_tells_them(seeing_checkpoint: Callable[[str], Path]) -> None:
    processor = load_processor(seeing_checkpoint("gemma3-crops"))
    assert processor is not None
    whole = f"\n\n<start_of_image>{'<image_soft_token>' * 36}<end_of_image>\n\n"
    tokenizer = SimpleNamespace(full_image_sequence=whole)
    for size, num_crops in (((60, 60), 0), ((120, 50), 2), ((60, 300), 4)):
        expected = Gemma3Processor.replace_image_token(tokenizer, {"num_crops": [num_crops]}, 0)
        assert processor.image(drawing(*size), "auto").text == expected


@pytest.mark.parametrize("family", ["llava-next", "smolvlm", "gemma3-crops"])
def test_little_detail_is_the_whole_alone(family: str, seeing_checkpoint: Callable[[str], Path]) -> None:
    processor = load_processor(seeing_checkpoint(family))
    assert processor is not None
    image = drawing(300, 64)
    low, high = (processor.image(image, detail) for detail in ("low", "high"))
    assert sum(len(picture.pixels) for picture in low.pictures) == 1
    assert sum(len(picture.pixels) for picture in high.pictures) > 1
    assert low.text.count(processor.placeholder) < high.text.count(processor.placeholder)


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
