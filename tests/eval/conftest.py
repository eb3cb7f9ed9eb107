"""A tiny model behind an engine in this process, as a subject."""

import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import pytest

from penstock.engine.aio import InProcessClient
from penstock.eval import Subject
from penstock.text import Tokenizer
from penstock.text.chat_template import ChatTemplate
from tests.engines import build_engine
from tests.fakes.tokenizer_files import byte_level_tokenizer, write_tokenizer

TEXT = (Path(__file__).parent / "test_bleu.py").read_text(encoding="utf-8")[:1500]

OpenSubject = Callable[[Path], AbstractAsyncContextManager[Subject]]


@pytest.fixture
def open_subject() -> OpenSubject:
    """Return what runs the checkpoint in a directory as a subject, until its block ends."""

    @asynccontextmanager
    async def opened(path: Path) -> AsyncIterator[Subject]:
        client = InProcessClient(lambda: build_engine(path, num_blocks=512, step_tokens=96))
        await client.start()
        try:
            yield Subject(client, Tokenizer.load(path), ChatTemplate.load(path))
        finally:
            await client.stop()

    return opened


@pytest.fixture(scope="session")
def bos_checkpoint(checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose tokenizer begins every text with a token of its own, and that has no chat template."""
    path = tmp_path_factory.mktemp("bos") / "model"
    shutil.copytree(checkpoint("llama"), path)
    return write_tokenizer(path, byte_level_tokenizer(), chat_template=None)


@pytest.fixture
def no_progress() -> Callable[[int, int], None]:
    return lambda num_done, num_all: None
