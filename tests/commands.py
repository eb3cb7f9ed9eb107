"""`penstock` as a person runs it: a real process, a real port, real signals; or its command line alone."""

import io
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from unittest import mock

import structlog

from penstock.cli.main import main

PENSTOCK = [sys.executable, "-c", "from penstock.cli.main import main; main()"]
_READY = re.compile(r"is ready at (http://\S+);")


class Server:
    """One `penstock serve` process, ready."""

    def __init__(self, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [*PENSTOCK, "serve", "--port", "0", "--threads", "1", "--cache-memory", "64MiB", *arguments],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PENSTOCK__LOG__LEVEL": "warning"},
        )
        self.said: list[str] = []
        self.url = ""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.said.append(line)
            if found := _READY.search(line):
                self.url = found[1]
                break
        assert self.url, "".join(self.said)
        # Somebody must read on, or a chatty server would block on a full pipe.
        self._reader = threading.Thread(target=self.said.extend, args=(self.process.stderr,))
        self._reader.start()

    def end(self) -> None:
        """Kill it if it still runs and collect what is left."""
        self.process.kill()
        self.process.wait()
        self._reader.join()
        assert self.process.stderr is not None
        self.process.stderr.close()

    def engine_pid(self) -> int:
        """Return the engine process, which is the server's only child."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return int(children[0])


@contextmanager
def serving(*arguments: str) -> Iterator[Server]:
    """Run `penstock serve` until the block ends."""
    server = Server(*arguments)
    try:
        yield server
    finally:
        server.end()


def run(*arguments: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    """Run `penstock` to its end."""
    return subprocess.run([*PENSTOCK, *arguments], capture_output=True, text=True, timeout=timeout, check=False)


def run_here(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `penstock` to its end in this process, which has imported what takes a new one seconds.

    For what a real process of the same command shows already: other arguments, and how they are refused. Not for what
    runs a model, which sets up logging for good, and other tests look at what is logged.
    """
    logging = structlog.get_config()
    out, err = io.StringIO(), io.StringIO()
    status: str | int | None = 0
    with mock.patch("sys.argv", ["penstock", *arguments]), redirect_stdout(out), redirect_stderr(err):
        try:
            main()
        except SystemExit as end:
            status = end.code
    assert isinstance(status, int)
    assert structlog.get_config() == logging, "this needs a process of its own"
    return subprocess.CompletedProcess(arguments, status, out.getvalue(), err.getvalue())
