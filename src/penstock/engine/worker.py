"""The other side of ``child``: what runs in the engine's processes. Imports little: a start waits for it."""

import contextlib
import os
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Protocol

import msgspec
import zmq

from penstock.engine.messages import LoadFailed, ToEngine, error_info
from penstock.engine.spawning import LENGTH, endpoint
from penstock.errors import ConfigError, PenstockError
from penstock.threads import WorkThread

if TYPE_CHECKING:
    from penstock.engine.host import SteppedEngine


class Host(Protocol):
    """What works in a worker: messages in, one message a step out."""

    @property
    def has_work(self) -> bool:
        """Whether ``step`` has something to do or to say."""

    def loaded(self) -> msgspec.Struct:
        """Return the message that says messages are taken."""

    def handle(self, message: Any) -> None:
        """Take a message in."""

    def step(self) -> msgspec.Struct:
        """Do some of the work and return what there is to say."""


def run_worker(address: str, build: "Callable[[Future[bytes]], SteppedEngine]") -> int:
    """Be the engine process: load with ``build(payload)``, then take messages and step until standard input closes.

    Returns the exit status. ``address`` is the directory that holds the sockets.
    """

    def host(payload: Future[bytes], wake: Callable[[], object]) -> Host:
        engine = build(payload)
        # It comes with modules that only ``build`` knows how to import.
        from penstock.engine.host import EngineHost

        return EngineHost(engine, wake)

    return run_host(address, msgspec.msgpack.Decoder(ToEngine), host)


def run_host(
    address: str,
    decoder: "msgspec.msgpack.Decoder[Any]",
    build: Callable[[Future[bytes], Callable[[], object]], Host],
) -> int:
    """Be a worker: load with ``build(payload, wake)``, then take messages and step until standard input closes.

    The payload comes while ``build`` does what it can without. Other threads call ``wake`` when they have made work.
    Returns the exit status.
    """
    context = zmq.Context()
    inbox, outbox = context.socket(zmq.PULL), context.socket(zmq.PUSH)
    inbox.set(zmq.RCVHWM, 0)
    outbox.set(zmq.SNDHWM, 0)
    inbox.connect(endpoint(address, "in"))
    outbox.connect(endpoint(address, "out"))
    encoder = msgspec.msgpack.Encoder()
    stdin = sys.stdin.fileno()
    try:
        # A byte in a pipe wakes the loop when another thread has something for it.
        wake_read, wake_write = os.pipe()
        host = build(WorkThread("payload").submit(_read_payload, stdin), lambda: os.write(wake_write, b"w"))
    except _NobodyLeftError:
        context.destroy(linger=0)
        shutil.rmtree(address, ignore_errors=True)
        return 0
    except PenstockError as error:
        outbox.send(encoder.encode(LoadFailed(error_info(error))))
        context.destroy(linger=1000)
        return 1 if isinstance(error, ConfigError) else 70
    outbox.send(encoder.encode(host.loaded()))
    poller = zmq.Poller()
    poller.register(inbox, zmq.POLLIN)
    poller.register(stdin, zmq.POLLIN)
    poller.register(wake_read, zmq.POLLIN)
    buffer = bytearray()
    while True:
        ready = dict(poller.poll(0 if host.has_work else None))
        if stdin in ready and not os.read(stdin, 1):
            # Nobody is left to take what was not sent, or to clean up.
            context.destroy(linger=0)
            shutil.rmtree(address, ignore_errors=True)
            return 0
        if wake_read in ready:
            os.read(wake_read, 4096)
        if inbox in ready:
            with contextlib.suppress(zmq.Again):
                while True:
                    host.handle(decoder.decode(inbox.recv(zmq.NOBLOCK)))
        if host.has_work:
            encoder.encode_into(host.step(), buffer)
            outbox.send(buffer)


class _NobodyLeftError(Exception):
    """Standard input closed before the settings came."""


def _read_payload(stdin: int) -> bytes:
    (length,) = LENGTH.unpack(_read(stdin, LENGTH.size))
    return _read(stdin, length)


def _read(stdin: int, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = os.read(stdin, size - len(data))
        if not part:
            raise _NobodyLeftError
        data += part
    return data
