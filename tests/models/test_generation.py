"""What a model's makers suggest is read, and what cannot be is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from penstock.errors import ModelUnreadable
from penstock.models import read_sampling_defaults
from penstock.protocol import SamplingDefaults


def write(path: Path, content: dict[str, Any]) -> Path:
    (path / "generation_config.json").write_text(json.dumps(content))
    return path


def test_suggestions_are_read_and_the_rest_is_neutral(tmp_path: Path) -> None:
    assert read_sampling_defaults(tmp_path) == SamplingDefaults()
    path = write(tmp_path, {"temperature": 0.7, "top_k": 20, "min_p": None, "do_sample": False, "eos_token_id": [1, 2]})
    assert read_sampling_defaults(path) == SamplingDefaults(temperature=0.7, top_k=20)


@pytest.mark.parametrize("wrong", [{"temperature": "hot"}, {"top_p": 1.5}, {"top_k": 2.5}, {"repetition_penalty": 0}])
def test_what_cannot_be_is_refused_by_name(wrong: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ModelUnreadable, match=rf"generation_config\.json.*{next(iter(wrong))}"):
        read_sampling_defaults(write(tmp_path, wrong))
