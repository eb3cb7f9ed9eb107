"""Settings that images cannot be prepared by are refused by name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from penstock.errors import ModelUnreadable
from penstock.images.families import load_processor
from penstock.models.vision.load import load_vision


def changed(path: Path, to: Path, file: str, changes: dict[str, Any]) -> Path:
    """Return a copy of a checkpoint with other values in ``file``."""
    shutil.copytree(path, to)
    values = json.loads((to / file).read_text())
    for key, value in changes.items():
        part = values
        *outer, last = key.split(".")
        for name in outer:
            part = part[name]
        part[last] = value
    (to / file).write_text(json.dumps(values))
    return to


@pytest.mark.parametrize(
    ("family", "file", "changes", "named"),
    [
        ("llava", "preprocessor_config.json", {"crop_size": {"height": 32, "width": 32}}, "image_size is 56.*32 x 32"),
        ("llava", "preprocessor_config.json", {"resample": 9}, "resample is 9"),
        ("llava", "preprocessor_config.json", {"size": {"shortest_edge": "56"}}, "size is"),
        ("llava", "preprocessor_config.json", {"size": [56, 56]}, "size"),
        ("llava", "preprocessor_config.json", {"crop_size": None, "do_center_crop": False}, "size is"),
        ("llava-next", "config.json", {"image_grid_pinpoints": [[56, 112]]}, "image_grid_pinpoints"),
        ("llava-next", "config.json", {"vision_feature_select_strategy": "full"}, "vision_feature_select_strategy"),
        ("smolvlm", "preprocessor_config.json", {"max_image_size": {"longest_edge": 52}}, "image_size is 48"),
        ("gemma3-vision", "config.json", {"vision_config.image_size": 64}, "size is"),
    ],
)
def test_the_processor_says_what_does_not_fit(
    family: str,
    file: str,
    changes: dict[str, Any],
    named: str,
    seeing_checkpoint: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    path = changed(seeing_checkpoint(family), tmp_path / "model", file, changes)
    with pytest.raises(ModelUnreadable, match=named):
        load_processor(path)


@pytest.mark.parametrize(
    ("family", "file", "changes", "named"),
    [
        ("llava", "preprocessor_config.json", {"image_mean": None}, "image_mean is None"),
        ("llava", "config.json", {"vision_feature_layer": 7}, "vision_feature_layer is 7"),
        ("llava", "config.json", {"projector_hidden_act": "relu"}, "projector_hidden_act is 'relu'"),
        ("llava", "config.json", {"vision_config.model_type": "dinov2"}, "vision_config.model_type is 'dinov2'"),
        ("llava", "config.json", {"vision_config.hidden_size": 50}, "num_attention_heads is 3"),
        ("llava", "config.json", {"text_config.model_type": "bloom"}, "text_config.model_type is 'bloom'"),
        ("llava", "config.json", {"vision_config": 3}, "vision_config is 3"),
        ("smolvlm", "config.json", {"scale_factor": 5}, "scale_factor is 5"),
        ("gemma3-vision", "config.json", {"mm_tokens_per_image": 5}, "mm_tokens_per_image is 5"),
    ],
)
def test_the_encoder_says_what_does_not_fit(
    family: str,
    file: str,
    changes: dict[str, Any],
    named: str,
    seeing_checkpoint: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    path = changed(seeing_checkpoint(family), tmp_path / "model", file, changes)
    with pytest.raises(ModelUnreadable, match=named):
        load_vision(path, "float32")
