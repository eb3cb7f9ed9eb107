"""What the engine process does ahead of time."""

import shutil
from concurrent.futures import Future
from pathlib import Path

import pytest

from penstock.errors import ModelUnreadable
from penstock.launch import ahead
from penstock.launch.ahead import begin, prefetch
from penstock.launch.settings import ModelSettings, Settings
from penstock.launch.worker import payload
from penstock.models import DEMO_MODEL, resolve_model


def test_weights_that_are_here_are_read_ahead(tmp_path: Path) -> None:
    for name in ("model-1.safetensors", "model-2.safetensors", "tokenizer.json"):
        (tmp_path / name).write_bytes(b"weights")
    assert prefetch(str(tmp_path)) == 2
    assert prefetch(str(tmp_path / "model-1.safetensors")) == 1


def test_other_names_are_left_to_whoever_loads() -> None:
    assert [prefetch(name) for name in ("penstock-mini", "shape:qwen2.5-0.5b", "organisation/name")] == [0, 0, 0]


def test_the_vocabulary_is_read_before_anybody_wants_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "configure_logging", lambda *_, **__: None)  # is for the whole process
    model = shutil.copytree(resolve_model(DEMO_MODEL), tmp_path / "model")
    begun = begin(_told(str(model)))
    try:
        begun.read_vocabulary()
        (model / "tokenizer.json").unlink()
        assert begun.tokenizer is not None
        assert begun.tokenizer.detokenizer(skip_special_tokens=True).push(300)
    finally:
        begun.close()


def test_a_vocabulary_that_cannot_be_read_is_left_to_whoever_uses_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ahead, "configure_logging", lambda *_, **__: None)  # is for the whole process
    model = shutil.copytree(resolve_model(DEMO_MODEL), tmp_path / "model")
    (model / "tokenizer.json").write_text("{")
    begun = begin(_told(str(model)))
    try:
        begun.read_vocabulary()
        assert begun.tokenizer is not None
        with pytest.raises(ModelUnreadable, match="is not a tokenizer"):
            begun.tokenizer.detokenizer(skip_special_tokens=True)
    finally:
        begun.close()


@pytest.mark.parametrize(("free", "left"), [(1 << 30, 824 << 20), (100 << 20, 0)])
def test_what_the_processes_themselves_take_is_not_planned_with(
    free: int, left: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ahead, "available_memory_bytes", lambda: free)
    monkeypatch.setattr(ahead, "configure_logging", lambda *_, **__: None)  # is for the whole process
    assert begin(_told("organisation/name")).available_bytes == left


def _told(model: str) -> Future[bytes]:
    told: Future[bytes] = Future()
    told.set_result(payload(Settings(model=ModelSettings(name=model))))
    return told
