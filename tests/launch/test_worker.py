"""What the engine process does ahead of time."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

import pytest

from penstock.engine.config import SchedulerConfig
from penstock.errors import ModelUnreadable
from penstock.launch import ahead
from penstock.launch.ahead import begin, prefetch
from penstock.launch.settings import ModelSettings, Settings
from penstock.launch.worker import payload
from penstock.models import DEMO_MODEL, resolve_model
from tests.kernels.backends import needs_native


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


def _told(model: str, *, step_tokens: int = 512) -> Future[bytes]:
    told: Future[bytes] = Future()
    settings = Settings(model=ModelSettings(name=model), scheduler=SchedulerConfig(step_tokens=step_tokens))
    told.set_result(payload(settings))
    return told


def test_a_torch_that_does_not_import_is_said_with_what_it_said(tmp_path: Path) -> None:
    broken = tmp_path / "torch" / "__init__.py"
    broken.parent.mkdir()
    broken.write_text("raise OSError('libtorch_global_deps.so: cannot open shared object file')")
    code = (
        "from penstock.lean_torch import defer_torch; defer_torch()\n"
        "from penstock.errors import MissingExtra\n"
        "from penstock.launch.ahead import Begun\n"
        "from penstock.launch.engine import build_engine\n"
        "from penstock.launch.settings import Settings\n"
        "try: build_engine(Settings(), ahead=Begun(Settings(), 1 << 30))\n"
        "except MissingExtra as error: print(error)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert "libtorch_global_deps.so: cannot open shared object file" in result.stdout
    assert "pip install 'penstock[engine]'" in result.stdout


@needs_native
@pytest.mark.parametrize(("step_tokens", "needs_torch"), [(512, False), (513, True)])
def test_steps_too_long_to_repeat_need_torch_at_once(
    step_tokens: int, needs_torch: bool, checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ahead, "configure_logging", lambda *_, **__: None)  # is for the whole process
    begun = begin(_told(str(checkpoint("llama")), step_tokens=step_tokens))
    try:
        assert begun.needs_torch == needs_torch
    finally:
        begun.close()
