"""An engine in this process, for commands that need one for a while."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from penstock.engine.aio import InProcessClient
from penstock.images.reader import ImageReader
from penstock.launch.engine import build_engine
from penstock.launch.images import load_images
from penstock.launch.settings import Settings
from penstock.launch.text import load_template, load_tokenizer
from penstock.telemetry import configure_logging
from penstock.text import Tokenizer
from penstock.text.chat_template import ChatTemplate


@dataclass(frozen=True, slots=True)
class LocalEngine:
    """A running engine and its model's text side."""

    client: InProcessClient
    tokenizer: Tokenizer
    template: ChatTemplate | None
    images: ImageReader | None
    """For a model that sees"""


@asynccontextmanager
async def open_engine(settings: Settings) -> AsyncIterator[LocalEngine]:
    """Run a model in this process until the block ends. Raises ``ConfigError`` if it cannot be run."""
    configure_logging("warning")
    tokenizer, template = load_tokenizer(settings.model), load_template(settings.model)
    images = load_images(settings.model, settings.images)
    client = InProcessClient(lambda: build_engine(settings))
    try:
        await client.start()
        yield LocalEngine(client, tokenizer, template, images)
    finally:
        await client.stop()
