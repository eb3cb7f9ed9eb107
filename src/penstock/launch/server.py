"""The server in front of an engine process, from the first byte to the last."""

import asyncio
import contextlib
import signal
import socket
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import uvloop
from prometheus_client import GCCollector, PlatformCollector, ProcessCollector

from penstock.engine.metrics import EngineMetrics
from penstock.engine.process import ProcessClient
from penstock.engine.spawning import Spawned
from penstock.errors import PenstockError
from penstock.estimate.memory import format_memory_plan
from penstock.launch import process, worker
from penstock.launch.settings import Settings
from penstock.protocol import ModelInfo
from penstock.resident import give_back, return_freed
from penstock.uncollected import uncollected

if TYPE_CHECKING:
    import uvicorn


def run_server(settings: Settings, listener: socket.socket, engine: Spawned, say: Callable[[str], None]) -> int:
    """Serve what ``engine`` loads, on ``listener``, until told to stop; returns the exit status.

    Raises ``ConfigError`` if it cannot.
    """
    status: int = uvloop.run(_Server(settings, listener, engine, say).run())
    return status


class _Server:
    """One run of the server."""

    def __init__(
        self, settings: Settings, listener: socket.socket, engine: Spawned, say: Callable[[str], None]
    ) -> None:
        self._settings = settings
        self._listener = listener
        self._engine = engine
        self._say = say
        self._told_to_stop = asyncio.Event()
        self._in_a_hurry = asyncio.Event()

    async def run(self) -> int:
        for name in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(name, self._on_signal)
        metrics = EngineMetrics()
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=metrics.registry)
        client = ProcessClient(process.command(), worker.payload(self._settings), metrics, spawned=self._engine)
        loading = asyncio.create_task(client.start())
        http: uvicorn.Server | None = None
        try:
            # On a thread, so that what the engine process says is heard meanwhile.
            with uncollected():
                http = await asyncio.to_thread(self._http, client, metrics)
            serving = asyncio.create_task(http.serve([self._listener]))
            stopping = asyncio.create_task(self._told_to_stop.wait())
            await asyncio.wait({loading, serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if loading.done():
                loading.result()
                self._announce(client.model())
                give_back()
                await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
            stopping.cancel()
            if client.model_or_none() is not None:
                await self._drain(client)
            # What could not finish ends in an error its reader sees, before its connection is closed.
            await client.stop()
            http.should_exit = True
            http.force_exit = self._in_a_hurry.is_set()
            await serving
            return 0
        finally:
            if http is not None:
                http.should_exit = True
            loading.cancel()
            with contextlib.suppress(asyncio.CancelledError, PenstockError):
                await loading
            await client.stop()

    def _http(self, client: ProcessClient, metrics: EngineMetrics) -> "uvicorn.Server":
        from penstock.launch.text import load_template, load_tokenizer

        settings = self._settings
        # First, for what reading it takes besides would lie on top of all else.
        tokenizer = load_tokenizer(settings.model)
        return_freed()

        import uvicorn

        _import_fastapi()
        from penstock.launch.images import load_images
        from penstock.server.app import create_app

        class QuietServer(uvicorn.Server):
            """Leaves signals to whoever runs it."""

            @contextlib.contextmanager
            def capture_signals(self) -> Iterator[None]:
                """Capture nothing."""
                yield

        app = create_app(
            client=client,
            tokenizer=tokenizer,
            template=load_template(settings.model),
            config=settings.server,
            registry=metrics.registry,
            images=load_images(settings.model, settings.images),
        )
        config = uvicorn.Config(
            app,
            loop="uvloop",
            http="httptools",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=75,
            timeout_graceful_shutdown=5,
        )
        return QuietServer(config)

    def _announce(self, model: ModelInfo) -> None:
        server = self._settings.server
        url = url_of(server.host, self._listener.getsockname()[1])
        name = server.served_names[0] if server.served_names else model.name
        self._say(format_memory_plan(model.memory))
        if model.kernels == "reference":
            self._say(
                "\nno native kernels for this: plain torch ops run, several times slower. If none were built, install\n"
                "a C++ compiler (apt install g++) and penstock again; float16 has none (--dtype bfloat16 does)"
            )
        self._say(
            f"\n{name} ({model.num_parameters / 1e6:.3g}M parameters, {model.dtype}, {model.kv_dtype} cache, "
            f"{model.kernels} kernels) "
            f"is ready at {url}; try\n"
            f"  curl {url}/v1/chat/completions -H 'content-type: application/json' -d '"
            f'{{"model": "{name}", "messages": [{{"role": "user", "content": "What does textwrap.dedent do?"}}]}}\'\n'
        )

    async def _drain(self, client: ProcessClient) -> None:
        """Finish what runs, unless told to stop again."""
        timeout_s = self._settings.server.drain_timeout_s
        draining = asyncio.create_task(client.drain(timeout_s))
        hurry = asyncio.create_task(self._in_a_hurry.wait())
        num_running = client.status().num_running
        if num_running:
            self._say(f"stopping: waiting up to {timeout_s:.0f} s for {num_running} running (again to stop at once)")
        await asyncio.wait({draining, hurry}, return_when=asyncio.FIRST_COMPLETED)
        for task in (draining, hurry):
            task.cancel()

    def _on_signal(self) -> None:
        if self._told_to_stop.is_set():
            self._in_a_hurry.set()
        self._told_to_stop.set()


def _import_fastapi() -> None:
    """Import it without building its models of OpenAPI, a third of its time: pydantic will where they are used."""
    from pydantic import BaseModel

    BaseModel.model_config["defer_build"] = True
    try:
        import fastapi  # noqa: F401 - the server's modules do again
    finally:
        del BaseModel.model_config["defer_build"]


def url_of(host: str, port: int) -> str:
    """Return where a program on this machine reaches a server that listens on ``host``."""
    reached = "127.0.0.1" if host in ("0.0.0.0", "::") else host  # noqa: S104 - compared, not bound
    return f"http://[{reached}]:{port}" if ":" in reached else f"http://{reached}:{port}"
