from pathlib import Path

import pytest

from benchmarks.curves import Bench, measure, one_batch, one_context, throughput
from benchmarks.peers.model import SHAPES, make_model, prompt_token_ids
from penstock.engine.config import CacheConfig
from penstock.kernels import use_threads
from penstock.launch.engine import build_engine
from penstock.launch.settings import ModelSettings, Settings


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    path: Path = make_model(tmp_path_factory.mktemp("models") / "tiny", SHAPES["tiny"])
    settings = Settings(model=ModelSettings(name=str(path)), cache=CacheConfig(memory_bytes=64 << 20))
    engine = build_engine(settings)
    use_threads(1)
    return Bench(engine, prompt_token_ids(SHAPES["tiny"]))


def test_each_curve_has_its_point(bench: Bench) -> None:
    points = [*throughput(bench, 4), *one_context(bench, 600), *one_batch(bench, 8)]
    assert [point[:2] for point in points] == [("throughput", 4), ("prefill", 600), ("decode", 600), ("step", 8)]
    assert all(value > 0 for *_, value in points)


@pytest.mark.slow
def test_all_places_and_threads_are_measured(bench: Bench) -> None:
    curves = measure(bench, [1, 2], rounds=1, longest=256)
    assert {curve: {n: [*points] for n, points in lines.items()} for curve, lines in curves.items()} == {
        curve: {1: places, 2: places}
        for curve, places in {
            "throughput": [1, 2, 4, 8, 16, 32, 64, 128, 256],
            "decode": [128, 256],
            "prefill": [128, 256],
            "step": [1, 2, 4, 8, 16, 32, 64, 128, 256],
        }.items()
    }
