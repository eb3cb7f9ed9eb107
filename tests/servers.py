"""A real server on a free port, in a thread of this process, over any engine client."""

import asyncio
import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import uvicorn

from penstock.engine.aio import InProcessClient
from penstock.images.config import ImageConfig
from penstock.images.families import load_processor
from penstock.images.reader import ImageReader
from penstock.server import ServerConfig
from penstock.server.app import create_app
from penstock.text import Tokenizer
from penstock.text.chat_template import ChatTemplate
from tests.engines import build_engine


@dataclass(frozen=True)
class RunningServer:
    """Where it listens and what is behind it."""

    url: str
    client: InProcessClient


@contextlib.contextmanager
def serve_checkpoint(
    path: Path,
    config: ServerConfig | None = None,
    num_blocks: int = 1024,
    speculate: Literal["off", "ngram", "suffix"] = "off",
) -> Iterator[RunningServer]:
    """Serve a tiny checkpoint until the block ends, images included if it sees."""
    listener = socket.create_server(("127.0.0.1", 0))
    loaded = threading.Event()
    running: list[tuple[asyncio.AbstractEventLoop, Callable[[], None], InProcessClient]] = []

    async def run() -> None:
        client = InProcessClient(lambda: build_engine(path, num_blocks=num_blocks, max_adapters=2, speculate=speculate))
        await client.start()
        processor = load_processor(path)
        app = create_app(
            client=client,
            tokenizer=Tokenizer.load(path),
            template=ChatTemplate.load(path),
            config=config or ServerConfig(),
            registry=client.metrics.registry,
            images=None if processor is None else ImageReader(processor, ImageConfig()),
        )
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off", ws="none"))

        def stop() -> None:
            server.should_exit = True

        running.append((asyncio.get_running_loop(), stop, client))
        loaded.set()
        await server.serve([listener])
        await client.stop()

    thread = threading.Thread(target=lambda: asyncio.run(run()))
    thread.start()
    loaded.wait()
    loop, stop, client = running[0]
    try:
        yield RunningServer(f"http://127.0.0.1:{listener.getsockname()[1]}", client)
    finally:
        loop.call_soon_threadsafe(stop)
        thread.join()
        listener.close()
