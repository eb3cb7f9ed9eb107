"""`python -m penstock.eval.draw` as a person runs it."""

import signal
import subprocess
import sys
from pathlib import Path

from PIL import Image


def test_drawings_are_written_and_a_reader_who_leaves_ends_it_quietly(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "penstock.eval.draw", str(tmp_path), "--count", "200"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline().strip() == str(tmp_path / "0.png")
        process.stdout.close()
        assert process.wait(60) == -signal.SIGPIPE
        assert process.stderr.read() == ""
    with Image.open(tmp_path / "0.png") as image:
        assert image.format == "PNG"
