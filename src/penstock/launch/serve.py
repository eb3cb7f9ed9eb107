"""`penstock serve`: the port, the engine's process, and then what takes long to import, which is the server's side."""

import errno
import socket
import sys
from collections.abc import Callable

from penstock.errors import PortInUse
from penstock.launch import process, worker
from penstock.launch.registered import find_registered
from penstock.launch.settings import Settings
from penstock.server.config import ServerConfig
from penstock.uncollected import uncollected


def serve(settings: Settings, say: Callable[[str], None]) -> int:
    """Serve until told to stop; returns the exit status. ``say`` prints a line for whoever started it.

    Raises ``ConfigError`` if it cannot start, with nothing left behind.
    """
    listener = _listen(settings.server)
    try:
        settings = find_registered(settings, say)
        say(f"loading {settings.model.name}")
        engine = process.start(worker.payload(settings))
        try:
            with uncollected():
                # First, for it leaves out a half of structlog.
                from penstock.telemetry import configure_logging

                configure_logging(settings.log.level, settings.log.format)
                from penstock.launch.server import run_server
            return run_server(settings, listener, engine, say)
        finally:
            engine.end()
    finally:
        listener.close()


def _listen(config: ServerConfig) -> socket.socket:
    """Take the port before anything is loaded for it."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((config.host, config.port))
    except OSError as error:
        listener.close()
        is_address_at_fault = isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL
        remedy = (
            "give an address of this machine with --host, or 0.0.0.0 for all of them"
            if is_address_at_fault
            else "stop what runs there, or choose another with --port"
        )
        raise PortInUse(
            f"cannot listen on {config.host}:{config.port}: {error.strerror or error}; {remedy}",
            param="server.host" if is_address_at_fault else "server.port",
        ) from error
    listener.listen(2048)
    listener.setblocking(False)
    return listener


def to_stderr(line: str) -> None:
    """Print for a person; standard output is for what a program may read."""
    sys.stderr.write(line + "\n")
    sys.stderr.flush()
