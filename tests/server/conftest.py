"""Servers over tiny models for all tests of the API."""

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import openai
import pytest
from tokenizers import Tokenizer as Backend

from penstock.server import ServerConfig
from tests.server.fakes import TEMPLATES
from tests.servers import RunningServer, serve_checkpoint
from tests.tiny_models import make_checkpoint


@pytest.fixture(scope="session")
def server(checkpoint: Callable[[str], Path]) -> Iterator[RunningServer]:
    config = ServerConfig(served_names=("tiny", "alias"), max_body_bytes=200_000, max_choices=4, max_logprobs=5)
    with serve_checkpoint(checkpoint("llama"), config) as running:
        yield running


@pytest.fixture(scope="session")
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="session")
def templated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], RunningServer]]:
    """Return a function from a template's name to a server with that template, over a model that says random things."""
    with contextlib.ExitStack() as stack:
        running: dict[str, RunningServer] = {}

        def server(name: str) -> RunningServer:
            if name not in running:
                path = make_checkpoint(tmp_path_factory.mktemp(name), max_position_embeddings=2048)
                settings = json.loads((path / "tokenizer_config.json").read_text())
                (path / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": TEMPLATES[name]}))
                if name == "mistral":
                    backend = Backend.from_file(str(path / "tokenizer.json"))
                    backend.add_special_tokens(["[TOOL_CALLS]"])
                    backend.save(str(path / "tokenizer.json"))
                running[name] = stack.enter_context(serve_checkpoint(path, ServerConfig(served_names=("tiny",))))
            return running[name]

        yield server


@pytest.fixture(scope="session")
def servers(templated: Callable[[str], RunningServer]) -> Iterator[Callable[[str], openai.OpenAI]]:
    """Return a function from a template's name to OpenAI's client of a server with that template."""
    with contextlib.ExitStack() as stack:
        clients: dict[str, openai.OpenAI] = {}

        def client(name: str) -> openai.OpenAI:
            if name not in clients:
                url = f"{templated(name).url}/v1"
                clients[name] = stack.enter_context(openai.OpenAI(base_url=url, api_key="none", max_retries=0))
            return clients[name]

        yield client
