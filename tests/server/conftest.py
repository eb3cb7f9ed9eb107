"""One server over a tiny model for all tests of the API."""

from collections.abc import Callable, Iterator
from pathlib import Path

import openai
import pytest

from penstock.server import ServerConfig
from tests.servers import RunningServer, serve_checkpoint


@pytest.fixture(scope="session")
def server(checkpoint: Callable[[str], Path]) -> Iterator[RunningServer]:
    config = ServerConfig(served_names=("tiny", "alias"), max_body_bytes=200_000, max_choices=4, max_logprobs=5)
    with serve_checkpoint(checkpoint("llama"), config) as running:
        yield running


@pytest.fixture(scope="session")
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client
