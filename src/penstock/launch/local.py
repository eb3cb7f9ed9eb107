"""An engine in this process, for commands that need one for a while."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from penstock.engine.aio import InProcessClient
from penstock.engine.host import SteppedEngine
from penstock.engine.profile import Profiler
from penstock.launch.engine import build_engine
from penstock.launch.settings import Settings
from penstock.launch.text import load_template, load_tokenizer
from penstock.telemetry import configure_logging
from penstock.text import ChatTemplate, Tokenizer


@dataclass(frozen=True, slots=True)
class LocalEngine:
    """A running engine and its model's text side."""

    client: InProcessClient
    tokenizer: Tokenizer
    template: ChatTemplate | None


@asynccontextmanager
async def open_engine(settings: Settings, profiler: Profiler | None = None) -> AsyncIterator[LocalEngine]:
    """Run a model until the block ends, watched by ``profiler`` if there is one.

    Raises ``ConfigError`` if it cannot be run.
    """
    configure_logging("warning")
    tokenizer, template = load_tokenizer(settings.model), load_template(settings.model)

    def build() -> SteppedEngine:
        engine = build_engine(settings, profiler)
        return engine if profiler is None else profiler.around_engine(engine)

    client = InProcessClient(build)
    try:
        await client.start()
        yield LocalEngine(client, tokenizer, template)
    finally:
        await client.stop()
