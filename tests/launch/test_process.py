"""The engine's process before it has its settings."""

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from penstock.launch import process


def test_one_that_nobody_takes_is_ended() -> None:
    me = psutil.Process()
    before = set(me.children())
    with process.started_early(is_wanted=True):
        (started,) = set(me.children()) - before
        assert started.is_running()
    assert not started.is_running()
    with process.started_early(is_wanted=False):
        assert set(me.children()) == before


def test_one_that_is_there_is_taken_once(monkeypatch: pytest.MonkeyPatch) -> None:
    read = "import sys; sys.stdin.buffer.read(8); sys.stdin.read()"
    monkeypatch.setattr(process, "command", lambda: [sys.executable, "-c", read])
    before = set(psutil.Process().children())
    with process.started_early(is_wanted=True):
        (early,) = set(psutil.Process().children()) - before
        first, second = process.start(b"{}"), process.start(b"{}")
        assert first.process.pid == early.pid != second.process.pid
    for spawned in (first, second):
        assert spawned.process.poll() is None
        spawned.end()


def test_one_whose_server_is_gone_says_nothing(tmp_path: Path) -> None:
    address = tmp_path / "sockets"
    address.mkdir()
    done = subprocess.run([*process.command(), str(address)], input=b"", capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert not address.exists()
