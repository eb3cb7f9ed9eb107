"""Starting a process of the engine's, before anything else that takes long: this imports little."""

import contextlib
import os
import struct
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

LENGTH = struct.Struct("<I")
"""What comes before the settings on standard input."""


def endpoint(directory: str, name: str) -> str:
    """Return the address of the socket ``name``: ``in`` is the engine's, ``out`` the client's."""
    return f"ipc://{Path(directory) / name}"


@dataclass(frozen=True, slots=True)
class Spawned:
    """A process that runs ``worker.run_host``, and the private directory its sockets are to live in."""

    process: subprocess.Popen[bytes]
    directory: "tempfile.TemporaryDirectory[str]"

    def tell(self, payload: bytes) -> None:
        """Hand the process its settings, which fit in a pipe: nothing is waited for."""
        assert self.process.stdin is not None, "it was started with a pipe"
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(LENGTH.pack(len(payload)) + payload)
            self.process.stdin.flush()

    def end(self) -> None:
        """Kill the process, if nobody has ended it, and free everything."""
        self.process.kill()
        self.process.wait()
        self.free()

    def free(self) -> None:
        """Free what a process that has ended leaves."""
        assert self.process.stdin is not None, "it was started with a pipe"
        # Closing writes what one that died at once has not read.
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.directory.cleanup()


def spawn(command: list[str], payload: bytes | None = None) -> Spawned:
    """Start ``command``, given the address to connect to as its last argument, and tell it ``payload``.

    Without one it waits to be told.
    """
    directory = tempfile.TemporaryDirectory(prefix="penstock-")
    process = subprocess.Popen(  # noqa: S603 - the command is ours
        [*command, directory.name],
        stdin=subprocess.PIPE,
        # Ctrl-C in a terminal is for the server, which drains; a child ends when told.
        start_new_session=True,
        # With glibc all threads share a heap: a step works in what starting freed, whichever thread it was, 20 MB.
        env={"MALLOC_ARENA_MAX": "1", **os.environ},
    )
    spawned = Spawned(process, directory)
    if payload is not None:
        spawned.tell(payload)
    return spawned
