"""What a process of the engine's leaves when it dies before it has read its settings."""

import subprocess
import tempfile
from pathlib import Path

from penstock.engine.spawning import Spawned


def test_one_that_died_before_it_had_read_anything_leaves_nothing() -> None:
    process = subprocess.Popen(["true"], stdin=subprocess.PIPE)
    process.wait()
    assert process.stdin is not None
    process.stdin.write(b"settings that nobody will read")
    directory = tempfile.TemporaryDirectory(prefix="penstock-")
    Spawned(process, directory).end()
    assert process.stdin.closed
    assert not Path(directory.name).exists()
