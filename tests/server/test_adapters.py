"""Adapters through the API: loaded, listed, asked for by OpenAI's client, unloaded."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from penstock.text import Tokenizer
from tests.adapters import merged, write_adapter
from tests.servers import RunningServer
from tests.tiny_models import reference_greedy

PROMPT = list(b"def main(argv):")
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 8, "extra_body": {"ignore_eos": True}}


@pytest.fixture
def http(server: RunningServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url) as client:
        yield client
        for name in ("first", "second"):
            client.post("/v1/unload_lora_adapter", json={"lora_name": name})


def load(http: httpx.Client, name: str, path: Path) -> httpx.Response:
    return http.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": str(path)})


def test_an_adapter_is_a_model(
    http: httpx.Client, client: openai.OpenAI, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    base = checkpoint("llama")
    adapter = write_adapter(tmp_path / "a", base)
    tokenizer = Tokenizer.load(base)
    expected = {
        "tiny": reference_greedy(base, PROMPT, 8),
        "first": reference_greedy(merged(tmp_path / "m", base, adapter), PROMPT, 8),
    }
    assert load(http, "first", adapter).json() == {"id": "first", "status": "loaded"}
    assert [model.id for model in client.models.list()] == ["tiny", "alias", "first"]
    assert expected["tiny"] != expected["first"]
    for name, tokens in expected.items():
        answer = client.completions.create(model=name, prompt=PROMPT, **GREEDY)
        assert answer.model == name
        assert answer.choices[0].text == tokenizer.decode(tokens, skip_special_tokens=True)
    stream = client.completions.create(model="first", prompt=PROMPT, stream=True, **GREEDY)
    assert "".join(chunk.choices[0].text for chunk in stream) == answer.choices[0].text
    assert http.post("/v1/unload_lora_adapter", json={"lora_name": "first"}).json()["status"] == "unloaded"
    with pytest.raises(openai.NotFoundError, match="there is no model 'first'"):
        client.completions.create(model="first", prompt=PROMPT, **GREEDY)


def test_what_is_refused(http: httpx.Client, checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "a", checkpoint("llama"))
    for name, path, status, param in (
        ("tiny", adapter, 400, "lora_name"),
        ("first", tmp_path, 400, "lora_path"),
        ("first", tmp_path / "nowhere", 400, "lora_path"),
    ):
        answer = load(http, name, path)
        assert (answer.status_code, answer.json()["error"]["param"]) == (status, param)
    assert load(http, "first", adapter).status_code == 200
    assert "unload it first" in load(http, "first", adapter).json()["error"]["message"]
    assert http.post("/v1/unload_lora_adapter", json={"lora_name": "second"}).status_code == 404
    assert http.post("/v1/load_lora_adapter", json={"lora_name": "x"}).json()["error"]["param"] == "lora_path"
