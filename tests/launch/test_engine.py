"""From settings to an engine."""

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import msgspec
import pytest
import torch

from penstock.engine.config import CacheConfig, RunnerConfig, SpeculationConfig
from penstock.errors import InvalidSetting
from penstock.estimate.memory import format_memory_plan
from penstock.images.families import load_processor
from penstock.kernels import use_threads
from penstock.launch.engine import build_engine
from penstock.launch.settings import ModelSettings, Settings
from penstock.launch.threads import share_threads, tied_cpus
from penstock.models.decoder import load_model
from penstock.protocol import TokenDelta
from penstock.quant import Scheme
from tests.engines import build_engine as direct_engine
from tests.engines import greedy, run_to_end, tokens_of
from tests.quantized_files import all_alike, quantize_checkpoint
from tests.seeing_models import drawing, with_images


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


def test_an_engine_says_what_a_checkpoint_s_codes_are(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    coded, _ = quantize_checkpoint(checkpoint("llama"), tmp_path, all_alike(Scheme(bits=4, group=16)))
    settings = Settings(
        model=ModelSettings(name=str(coded)), cache=CacheConfig(memory_bytes=2**24), runner=RunnerConfig(threads=1)
    )
    assert build_engine(settings).model.dtype == "w4a16"


def test_a_draft_model_takes_its_share_of_memory_and_guesses(checkpoint: Callable[[str], Path]) -> None:
    name = str(checkpoint("llama"))
    cache = CacheConfig(memory_bytes=1 << 20)
    plain = build_engine(Settings(model=ModelSettings(name=name), cache=cache))
    speculation = SpeculationConfig(method="draft", model=name)
    engine = build_engine(Settings(model=ModelSettings(name=name), cache=cache, speculation=speculation))
    assert engine.model.memory.block_bytes == 2 * plain.model.memory.block_bytes
    assert engine.model.memory.weights_bytes == 2 * plain.model.memory.weights_bytes
    request = greedy("r", [1, 2, 3], 40)
    expected, found = run_to_end(plain, [request])["r"], run_to_end(engine, [request])["r"]
    assert tokens_of(found) == tokens_of(expected)
    counters = engine.status().counters
    assert counters.num_accepted_tokens == counters.num_draft_tokens > 0


@pytest.mark.parametrize(
    ("method", "model", "words"),
    [("draft", None, "--speculative-model"), ("ngram", "m", "--speculate draft"), ("draft", "mini", "vocabulary")],
)
def test_drafts_that_cannot_be_are_refused(
    method: Literal["draft", "ngram"], model: str | None, words: str, checkpoint: Callable[[str], Path]
) -> None:
    speculation = SpeculationConfig(method=method, model="penstock-mini" if model == "mini" else model)
    with pytest.raises(InvalidSetting, match=words):
        build_engine(Settings(model=ModelSettings(name=str(checkpoint("llama"))), speculation=speculation))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_images_are_encoded_by_whom_the_settings_say(
    num_workers: int, seeing_checkpoint: Callable[[str], Path]
) -> None:
    path = seeing_checkpoint("llava")
    settings = Settings(
        model=ModelSettings(name=str(path)),
        cache=CacheConfig(memory_bytes=2**24, encoder_memory_bytes=2**20),
        runner=RunnerConfig(threads=1, encoder_workers=num_workers),
    )
    engine = build_engine(settings)
    news = threading.Event()
    engine.on_news(news.set)
    try:
        processor = load_processor(path)
        assert processor is not None
        token_ids, pictures = with_images(path, processor, "what is @?", [drawing(50, 60)])
        request = msgspec.structs.replace(greedy("one", token_ids, 8), pictures=tuple(pictures))
        expected = tokens_of(run_to_end(direct_engine(path), [request])["one"])
        engine.add(request)
        deltas: list[TokenDelta] = []
        while len(deltas) < 8:
            if not engine.has_work:
                assert news.wait(30)
            deltas += engine.step()
        assert tokens_of(deltas) == expected
        status = engine.status().seeing
        assert status is not None
        assert (status.num_workers, status.num_encoded_pictures) == (num_workers, 1)
        memory = engine.model.memory
        assert memory.encoder_cache_bytes == 2**20
        assert memory.encoder_weights_bytes > 0
        assert "encoder cache" in format_memory_plan(memory)
    finally:
        engine.close()


def test_a_model_that_sees_nothing_has_no_encoder_processes(checkpoint: Callable[[str], Path]) -> None:
    settings = Settings(
        model=ModelSettings(name=str(checkpoint("llama"))),
        cache=CacheConfig(memory_bytes=2**24),
        runner=RunnerConfig(threads=1, encoder_workers=2),
    )
    with pytest.raises(InvalidSetting, match="--encoder-workers"):
        build_engine(settings)


@pytest.mark.parametrize(
    ("num_cores", "threads", "num_workers", "expected"),
    [
        (8, None, 0, (7, 8, 0)),
        (4, None, 1, (2, 3, 1)),
        (8, None, 2, (3, 4, 2)),
        (1, None, 0, (1, 1, 0)),
        (1, None, 1, (1, 1, 1)),
        (2, None, 0, (1, 2, 0)),
        (8, 3, 2, (3, 3, 2)),
        (4, 3, 0, (3, 3, 0)),
        (4, 4, 0, (3, 4, 0)),
        (4, 6, 0, (5, 6, 0)),
    ],
)
def test_every_thread_has_a_core(
    num_cores: int,
    threads: int | None,
    num_workers: int,
    expected: tuple[int, int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("penstock.launch.threads.usable_cores", lambda: num_cores)
    runner = RunnerConfig(threads=threads, encoder_workers=num_workers)
    assert share_threads(Settings(runner=runner)) == expected


@pytest.mark.parametrize(("pin", "expected"), [(False, []), (True, [4, 6])])
def test_threads_are_tied_to_cores_if_that_is_asked_for(
    pin: bool, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("penstock.launch.threads.core_cpus", lambda: [2, 4, 6, 8])
    assert tied_cpus(Settings(runner=RunnerConfig(pin_threads=pin)), 3) == expected
