"""What a checkpoint says about pooling."""

import json
from pathlib import Path
from typing import Any

import pytest

from penstock.errors import ModelUnreadable
from penstock.models import read_pooling


def written(path: Path, content: dict[str, Any]) -> Path:
    (path / "1_Pooling").mkdir()
    (path / "1_Pooling" / "config.json").write_text(json.dumps(content))
    return path


@pytest.mark.parametrize(
    ("content", "pooling"),
    [
        ({"word_embedding_dimension": 64, "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}, "mean"),
        ({"pooling_mode_mean_tokens": False, "pooling_mode_lasttoken": True, "include_prompt": True}, "last"),
        ({"pooling_mode": "mean"}, "mean"),
        ({"pooling_mode": "lasttoken"}, "last"),
    ],
)
def test_modes(tmp_path: Path, content: dict[str, Any], pooling: str) -> None:
    assert read_pooling(written(tmp_path, content)) == pooling


def test_most_models_say_nothing(tmp_path: Path) -> None:
    assert read_pooling(tmp_path) is None
    assert read_pooling(tmp_path / "model.gguf") is None


@pytest.mark.parametrize(
    "content",
    [
        {"pooling_mode_cls_token": True},
        {"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True},
        {"pooling_mode": "cls"},
        {},
    ],
)
def test_other_modes_are_refused_with_the_way_out(tmp_path: Path, content: dict[str, Any]) -> None:
    with pytest.raises(ModelUnreadable, match="--pooling"):
        read_pooling(written(tmp_path, content))
