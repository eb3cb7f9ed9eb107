"""A process of the engine's as its parent sees it: fed over ZeroMQ, its death noticed, its end certain.

The parent writes the settings to the child's standard input, length first, and keeps that pipe open: when it closes,
the child knows that nobody is left to serve, and ends.
"""

import asyncio
import contextlib
import signal
import tempfile

import zmq
import zmq.asyncio

from penstock.engine.worker import LENGTH, endpoint


class ChildProcess:
    """A process that runs ``worker.run_host``, its sockets and the private directory they live in."""

    def __init__(self, process: asyncio.subprocess.Process, directory: "tempfile.TemporaryDirectory[str]") -> None:
        self.process = process
        self._directory = directory
        self._context = zmq.asyncio.Context()
        # Bounded by the requests that are taken and by their tokens, so neither side may drop or block.
        self._to_child = self._context.socket(zmq.PUSH)
        self._from_child = self._context.socket(zmq.PULL)
        for socket, name in ((self._to_child, "in"), (self._from_child, "out")):
            socket.set(zmq.SNDHWM if socket is self._to_child else zmq.RCVHWM, 0)
            socket.set(zmq.LINGER, 0)
            socket.bind(endpoint(directory.name, name))

    @classmethod
    async def spawn(cls, command: list[str], payload: bytes) -> "ChildProcess":
        """Start ``command``, given the address to connect to as its last argument, and hand it ``payload``."""
        directory = tempfile.TemporaryDirectory(prefix="penstock-")
        process = await asyncio.create_subprocess_exec(
            *command,
            directory.name,
            stdin=asyncio.subprocess.PIPE,
            # Ctrl-C in a terminal is for the server, which drains; a child ends when told.
            start_new_session=True,
        )
        worker = cls(process, directory)
        assert process.stdin is not None, "the worker was started with a pipe"
        with contextlib.suppress(ConnectionError):
            process.stdin.write(LENGTH.pack(len(payload)) + payload)
            await process.stdin.drain()
        return worker

    def send(self, data: bytes) -> None:
        """Queue a message."""
        # Never waits: the queue has no limit of its own. A dead worker's requests are failed by the watcher.
        self._to_child.send(data)

    async def receive(self) -> bytes:
        """Return the next message; waits for ever if the process has died."""
        data: bytes = await self._from_child.recv()
        return data

    async def close(self) -> None:
        """End the process and free everything; safe on a dead one."""
        if self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self.process.terminate()
            try:
                await asyncio.wait_for(self.process.wait(), 5.0)
            except TimeoutError:
                self.process.kill()
                await self.process.wait()
        if self.process.stdin is not None:
            self.process.stdin.close()
        self._context.destroy(linger=0)
        self._directory.cleanup()


def exit_reason(returncode: int | None) -> str:
    """Return what became of a process, to follow its name."""
    if returncode is None:
        return "stopped answering"
    if returncode < 0:
        with contextlib.suppress(ValueError):
            return f"was killed by {signal.Signals(-returncode).name}"
    return f"ended with status {returncode}"
