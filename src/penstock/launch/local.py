"""An engine in this process, for commands that need one for a while."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from penstock.engine.aio import InProcessClient
from penstock.engine.config import RunnerConfig
from penstock.launch.engine import build_engine
from penstock.launch.settings import ModelSettings, Settings
from penstock.models import resolve_model
from penstock.telemetry import configure_logging
from penstock.text import ChatTemplate, Tokenizer


@dataclass(frozen=True, slots=True)
class LocalEngine:
    """A running engine and its model's text side."""

    client: InProcessClient
    tokenizer: Tokenizer
    template: ChatTemplate | None


@asynccontextmanager
async def open_engine(model: str, *, threads: int | None = None, kv_dtype: str = "auto") -> AsyncIterator[LocalEngine]:
    """Run ``model`` until the block ends. Raises ``ConfigError`` if it cannot be run."""
    configure_logging("warning")
    path = resolve_model(model)
    settings = Settings(model=ModelSettings(name=model), runner=RunnerConfig(threads=threads, kv_dtype=kv_dtype))
    client = InProcessClient(lambda: build_engine(settings))
    try:
        await client.start()
        yield LocalEngine(client, Tokenizer.load(path), ChatTemplate.load(path))
    finally:
        await client.stop()
