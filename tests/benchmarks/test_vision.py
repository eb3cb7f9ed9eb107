from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks.vision import PARTS, measure
from penstock.kernels import use_threads


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    yield
    use_threads(1)
    torch.set_num_threads(1)


@pytest.mark.slow
def test_all_parts_are_measured(tmp_path: Path) -> None:
    settings = Namespace(parts=PARTS, pairs=1, requests=16, threads=1, dtype="float32", quantize=None)
    found = measure("tiny", tmp_path, settings)
    assert found["image_tokens"] == 64
    assert found["repeated question"]["ratios"]["median"] > 1
    for lengths in ("mixed", "equal"):
        assert found[f"16 at a time, {lengths} lengths, tokens per s"]["ratios"]["median"] > 0
    for place in ("in the step", "one encoder process"):
        (stall,) = (figures for name, figures in found.items() if name.startswith("stall") and name.endswith(place))
        assert stall["longest_s"] >= stall["median_beside_images_s"] > 0
