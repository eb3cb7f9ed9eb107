"""A server's life: bind, start the engine, answer, drain, leave."""

import asyncio
import contextlib
import errno
import importlib
import signal
import socket
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import msgspec

from penstock.engine import EngineMetrics, ProcessClient
from penstock.errors import InvalidSetting, PortInUse
from penstock.estimate import format_memory_plan
from penstock.launch.settings import Settings
from penstock.models import resolve_model
from penstock.protocol import ModelInfo
from penstock.telemetry import configure_logging

if TYPE_CHECKING:
    import uvicorn

_FLUSH_S = 5
"""How long answers that are complete may take to reach their clients."""


def serve(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT, then finish what runs. Raises ``ConfigError`` if it cannot start."""
    import uvloop

    configure_logging(settings.log.level, settings.log.format)
    listener = bind(settings.server.host, settings.server.port)
    with listener, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(settings, listener))


def bind(host: str, port: int) -> socket.socket:
    """Return a socket that listens on ``host`` and ``port``. Raises ``PortInUse`` or ``InvalidSetting``."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (socket.gaierror, OverflowError) as error:
        raise InvalidSetting(
            f"cannot listen on {host}:{port} ({error}); give an address of this machine with --host and a port "
            "from 0 to 65535 with --port"
        ) from error
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(2048)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise PortInUse(
                f"port {port} on {host} is in use by another process; stop it, or choose another with --port"
            ) from error
        raise InvalidSetting(
            f"cannot listen on {host}:{port} ({error.strerror}); choose others with --host and --port"
        ) from error
    except OverflowError as error:
        listener.close()
        raise InvalidSetting(f"port {port} is not from 0 to 65535; choose another with --port") from error
    return listener


async def _serve(settings: Settings, listener: socket.socket) -> None:
    stop, stop_now = asyncio.Event(), asyncio.Event()

    def on_signal() -> None:
        (stop_now if stop.is_set() else stop).set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    metrics = EngineMetrics()
    client = ProcessClient([sys.executable, "-m", "penstock.launch.worker"], msgspec.json.encode(settings), metrics)
    # The engine imports and loads on other cores while this process gets the server ready.
    starting = asyncio.create_task(client.start())
    stopping = asyncio.create_task(stop.wait())
    serving: asyncio.Task[None] | None = None
    server: uvicorn.Server | None = None
    try:
        server = await asyncio.to_thread(_build_server, settings, client, metrics)
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            starting.result()
            _announce(client.model(), listener, settings)
            await stopping
            await _drain(client, settings.server.drain_timeout_s, stop_now)
    finally:
        stopping.cancel()
        starting.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await starting
        await client.stop()
        if server is not None and serving is not None:
            server.should_exit = True
            server.force_exit = stop_now.is_set()
            await serving


async def _drain(client: ProcessClient, timeout_s: float, stop_now: asyncio.Event) -> None:
    draining = asyncio.create_task(client.drain(timeout_s))
    hurrying = asyncio.create_task(stop_now.wait())
    await asyncio.wait({draining, hurrying}, return_when=asyncio.FIRST_COMPLETED)
    draining.cancel()
    hurrying.cancel()


def _build_server(settings: Settings, client: ProcessClient, metrics: EngineMetrics) -> "uvicorn.Server":
    # These imports take as long as the engine's own; see _serve.
    uvicorn = importlib.import_module("uvicorn")
    from penstock.server import create_app
    from penstock.text import ChatTemplate, Tokenizer

    path = resolve_model(settings.model.name, settings.model.revision)
    app = create_app(
        client=client,
        tokenizer=Tokenizer.load(path),
        template=ChatTemplate.load(path),
        config=settings.server,
        registry=metrics.registry,
    )
    config = uvicorn.Config(
        app,
        http="httptools",
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=_FLUSH_S,
    )
    server: uvicorn.Server = uvicorn.Server(config)
    # Signals are ours: uvicorn's handlers would close the listener before the engine has drained.
    server.capture_signals = _no_signals
    return server


@contextlib.contextmanager
def _no_signals() -> Iterator[None]:
    yield


def _announce(model: ModelInfo, listener: socket.socket, settings: Settings) -> None:
    host, port = listener.getsockname()[:2]
    reachable = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - named, not bound
    url = f"http://[{reachable}]:{port}" if ":" in reachable else f"http://{reachable}:{port}"
    name = settings.server.served_names[0] if settings.server.served_names else model.name
    example = f'{{"model": "{name}", "messages": [{{"role": "user", "content": "What does textwrap.dedent do?"}}]}}'
    sys.stdout.write(
        f"{format_memory_plan(model.memory)}\n"
        f"{name} ({model.num_parameters / 1e6:,.1f}M parameters, {model.dtype}) answers at {url}/v1; try\n"
        f"  curl {url}/v1/chat/completions -H 'content-type: application/json' -d '{example}'\n"
    )
    sys.stdout.flush()
