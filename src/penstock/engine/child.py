"""A process of the engine's as its parent sees it: fed over ZeroMQ, its death noticed, its end certain.

The parent writes the settings to the child's standard input, length first, and keeps that pipe open: when it closes,
the child knows that nobody is left to serve, and ends.
"""

import asyncio
import contextlib
import signal
from collections.abc import Coroutine
from typing import Any, TypeVar

import zmq
import zmq.asyncio

from penstock.engine.spawning import Spawned, endpoint
from penstock.threads import WorkThread

T = TypeVar("T")


class ChildProcess:
    """A process that runs ``worker.run_host``, its sockets and the private directory they live in."""

    def __init__(self, spawned: Spawned) -> None:
        """Take over what ``spawn`` has started."""
        self._spawned = spawned
        self._ended = asyncio.wrap_future(WorkThread("child").submit(spawned.process.wait))
        self._context = zmq.Context()
        # Bounded by the requests that are taken and by their tokens, so neither side may drop or block.
        self._to_child = zmq.asyncio.Socket(self._context, zmq.PUSH)
        self._from_child = zmq.Socket(self._context, zmq.PULL)
        for socket, name in ((self._to_child, "in"), (self._from_child, "out")):
            socket.set(zmq.SNDHWM if socket is self._to_child else zmq.RCVHWM, 0)
            socket.set(zmq.LINGER, 0)
            socket.bind(endpoint(spawned.directory.name, name))
        # A message comes with every step. By ZeroMQ's own futures one takes the loop twice as long.
        self._received: asyncio.Queue[bytes] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._from_child.fileno(), self._read)

    @property
    def pid(self) -> int:
        """The process's."""
        return self._spawned.process.pid

    @property
    def returncode(self) -> int | None:
        """The exit status, negative for a signal; None while it runs."""
        return self._ended.result() if self._ended.done() else None

    async def wait(self) -> None:
        """Wait until the process has ended."""
        await asyncio.shield(self._ended)

    def send(self, data: bytes) -> None:
        """Queue a message."""
        # Never waits: the queue has no limit of its own. A dead worker's requests are failed by the watcher.
        self._to_child.send(data)

    async def receive(self) -> bytes:
        """Return the next message; waits for ever if the process has died."""
        return await self._received.get()

    def _read(self) -> None:
        # The descriptor says that something has changed since somebody looked, so all there is has to be taken.
        with contextlib.suppress(zmq.Again):
            while True:
                self._received.put_nowait(self._from_child.recv(zmq.NOBLOCK))

    async def until_dead(self, awaited: Coroutine[Any, Any, T], timeout_s: float | None = None) -> T | None:
        """Return what ``awaited`` gives, or None if the process dies, or time is up, first."""
        waiting = asyncio.ensure_future(awaited)
        died = asyncio.ensure_future(self.wait())
        try:
            await asyncio.wait({waiting, died}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            return waiting.result() if waiting.done() else None
        finally:
            waiting.cancel()
            died.cancel()

    def kill(self) -> None:
        """End the process at once; safe on a dead one."""
        if self.returncode is None:
            self._spawned.process.kill()

    async def close(self) -> None:
        """End the process and free everything; safe on a dead one, and again."""
        if self.returncode is None:
            self._spawned.process.terminate()
            try:
                await asyncio.wait_for(self.wait(), 5.0)
            except TimeoutError:
                self._spawned.process.kill()
                await self.wait()
        if not self._from_child.closed:
            self._loop.remove_reader(self._from_child.fileno())
            self._from_child.close()
        self._to_child.close()
        self._context.term()
        self._spawned.free()


def exit_reason(returncode: int | None) -> str:
    """Return what became of a process, to follow its name."""
    if returncode is None:
        return "stopped answering"
    if returncode < 0:
        with contextlib.suppress(ValueError):
            return f"was killed by {signal.Signals(-returncode).name}"
    return f"ended with status {returncode}"
