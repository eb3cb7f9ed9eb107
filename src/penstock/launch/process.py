"""The engine's process as it is started: before whatever else takes long, for this imports little."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from penstock.engine.spawning import Spawned, spawn

_early: list[Spawned] = []
"""The process that waits for its settings, if there is one"""


def command() -> list[str]:
    """Return what to run; the client appends the address."""
    return [sys.executable, "-m", "penstock.launch.worker"]


@contextmanager
def started_early(*, is_wanted: bool) -> Iterator[None]:
    """Meanwhile, if it ``is_wanted``, a process is starting, for ``start`` to take; one that it does not is ended."""
    if is_wanted:
        _early.append(spawn(command()))
    try:
        yield
    finally:
        while _early:
            _early.pop().end()


def start(payload: bytes) -> Spawned:
    """Return a process that has been told its settings; see ``worker.payload``."""
    spawned = _early.pop() if _early else spawn(command())
    spawned.tell(payload)
    return spawned
