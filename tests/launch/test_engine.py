"""From settings to an engine."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from penstock.engine.config import CacheConfig, RunnerConfig
from penstock.kernels import use_threads
from penstock.launch.engine import build_engine
from penstock.launch.settings import ModelSettings, Settings
from penstock.models.decoder import load_model


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Leave threads as the other tests expect them."""
    yield
    use_threads(1)
    torch.set_num_threads(1)


@pytest.mark.parametrize("kv_dtype", ["auto", "float32", "bfloat16", "int8"])
def test_the_cache_takes_what_the_plan_says(kv_dtype: str, checkpoint: Callable[[str], Path]) -> None:
    path = checkpoint("qwen3")
    settings = Settings(
        model=ModelSettings(name=str(path)),
        cache=CacheConfig(block_size=12, memory_bytes=1 << 20),
        runner=RunnerConfig(kv_dtype=kv_dtype, threads=1),
    )
    model = build_engine(settings).model
    assert model.kv_dtype == ("float32" if kv_dtype == "auto" else kv_dtype)
    plan = model.memory
    cache = load_model(path, kv_dtype=kv_dtype).new_cache(plan.num_blocks, plan.block_size)
    assert sum(tensor.nbytes for kv in cache for tensor in kv.tensors()) == plan.cache_bytes


def test_an_engine_says_what_its_model_s_makers_suggest(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    path = shutil.copytree(checkpoint("llama"), tmp_path / "model")
    (path / "generation_config.json").write_text(json.dumps({"temperature": 0.25}))
    settings = Settings(
        model=ModelSettings(name=str(path)), cache=CacheConfig(memory_bytes=2**24), runner=RunnerConfig(threads=1)
    )
    assert build_engine(settings).model.sampling.temperature == 0.25
