"""A process of the engine's as its parent sees it: fed over ZeroMQ, its death noticed, its end certain.

The parent writes the settings to the child's standard input, length first, and keeps that pipe open: when it closes,
the child knows that nobody is left to serve, and ends.
"""

import asyncio
import contextlib
import signal

import zmq
import zmq.asyncio

from penstock.engine.spawning import Spawned, endpoint
from penstock.threads import WorkThread


class ChildProcess:
    """A process that runs ``worker.run_host``, its sockets and the private directory they live in."""

    def __init__(self, spawned: Spawned) -> None:
        """Take over what ``spawn`` has started."""
        self._spawned = spawned
        self._ended = asyncio.wrap_future(WorkThread("child").submit(spawned.process.wait))
        self._context = zmq.asyncio.Context()
        # Bounded by the requests that are taken and by their tokens, so neither side may drop or block.
        self._to_child = self._context.socket(zmq.PUSH)
        self._from_child = self._context.socket(zmq.PULL)
        for socket, name in ((self._to_child, "in"), (self._from_child, "out")):
            socket.set(zmq.SNDHWM if socket is self._to_child else zmq.RCVHWM, 0)
            socket.set(zmq.LINGER, 0)
            socket.bind(endpoint(spawned.directory.name, name))

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
        data: bytes = await self._from_child.recv()
        return data

    def kill(self) -> None:
        """End the process at once; safe on a dead one."""
        if self.returncode is None:
            self._spawned.process.kill()

    async def close(self) -> None:
        """End the process and free everything; safe on a dead one."""
        if self.returncode is None:
            self._spawned.process.terminate()
            try:
                await asyncio.wait_for(self.wait(), 5.0)
            except TimeoutError:
                self._spawned.process.kill()
                await self.wait()
        self._context.destroy(linger=0)
        self._spawned.free()


def exit_reason(returncode: int | None) -> str:
    """Return what became of a process, to follow its name."""
    if returncode is None:
        return "stopped answering"
    if returncode < 0:
        with contextlib.suppress(ValueError):
            return f"was killed by {signal.Signals(-returncode).name}"
    return f"ended with status {returncode}"
