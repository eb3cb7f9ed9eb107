"""From settings to an engine."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from penstock.engine.config import CacheConfig, RunnerConfig
from penstock.launch.engine import build_engine
from penstock.launch.settings import ModelSettings, Settings


def test_an_engine_says_what_its_model_s_makers_suggest(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    path = shutil.copytree(checkpoint("llama"), tmp_path / "model")
    (path / "generation_config.json").write_text(json.dumps({"temperature": 0.25}))
    settings = Settings(
        model=ModelSettings(name=str(path)), cache=CacheConfig(memory_bytes=2**24), runner=RunnerConfig(threads=1)
    )
    assert build_engine(settings).model.sampling.temperature == 0.25
