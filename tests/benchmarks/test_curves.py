from pathlib import Path

import pytest

from benchmarks import curves
from benchmarks.curves import Bench, measure, one_context, one_load
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
    points = [*one_load(bench, 4), *one_context(bench, 600)]
    assert [point[:2] for point in points] == [("throughput", 4), ("step", 4), ("prefill", 600), ("decode", 600)]
    assert all(value > 0 for *_, value in points)


@pytest.mark.parametrize(("long_s", "num_rounds"), [(0.0, 1), (60.0, 2)])
def test_what_takes_long_is_measured_once(
    long_s: float, num_rounds: int, bench: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(curves, "LONG_S", long_s)
    monkeypatch.setattr(curves, "CONCURRENCY", (1, 3))
    found = measure(bench, [1], rounds=2, longest=256)
    assert {place["rounds"] for lines in found.values() for points in lines.values() for place in points.values()} == {
        num_rounds
    }
    curves.write_plot(tmp_path / "curves.png", found, "all of them")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_all_places_and_threads_are_measured(bench: Bench) -> None:
    found = measure(bench, [1, 2], rounds=1, longest=256)
    assert {curve: {n: [*points] for n, points in lines.items()} for curve, lines in found.items()} == {
        curve: {1: places, 2: places}
        for curve, places in {
            "throughput": [1, 2, 4, 8, 16, 32, 64, 128, 256],
            "decode": [128, 256],
            "prefill": [128, 256],
            "step": [1, 2, 4, 8, 16, 32, 64, 128, 256],
        }.items()
    }
