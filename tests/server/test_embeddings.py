"""Embeddings, through OpenAI's own client."""

import asyncio
import base64
import time
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import torch

from penstock.errors import StepFailed
from penstock.protocol import GenerateRequest, TokenDelta, Usage
from penstock.server import ServerConfig
from penstock.text import Tokenizer
from tests.server.fakes import FakeEngine, http_over
from tests.servers import RunningServer
from tests.tiny_models import VOCAB_SIZE, reference

TEXT = "def f(x):"


@torch.no_grad()
def states_of(path: Path, text: str) -> np.ndarray:
    tokens = Tokenizer.load(path).encode(text, add_special_tokens=True)
    states: np.ndarray = reference(path).base_model(torch.tensor([tokens])).last_hidden_state[0].double().numpy()
    return states


def unit(vector: np.ndarray) -> np.ndarray:
    scaled: np.ndarray = vector / np.linalg.norm(vector)
    return scaled


@pytest.fixture
def path(checkpoint: Callable[[str], Path]) -> Path:
    return checkpoint("llama")


def test_one_text(client: openai.OpenAI, path: Path) -> None:
    answer = client.embeddings.create(model="tiny", input=TEXT)
    (one,) = answer.data
    assert (one.index, one.object, answer.object, answer.model) == (0, "embedding", "list", "tiny")
    assert np.abs(np.array(one.embedding) - unit(states_of(path, TEXT).mean(0))).max() <= 1e-4
    assert (answer.usage.prompt_tokens, answer.usage.total_tokens) == (9, 9)


@pytest.mark.parametrize("encoding_format", ["float", "base64"])
def test_many_texts_in_their_order(client: openai.OpenAI, path: Path, encoding_format: Any) -> None:
    texts = [TEXT * (1 + i % 3) + "x" * i for i in range(70)]
    # More than run at a time.
    answer = client.embeddings.create(model="tiny", input=texts, encoding_format=encoding_format)
    assert [one.index for one in answer.data] == list(range(70))
    for one, text in zip(answer.data, texts, strict=True):
        raw: Any = one.embedding
        vector = np.frombuffer(base64.b64decode(raw), dtype="<f4") if encoding_format == "base64" else np.array(raw)
        assert np.abs(vector - unit(states_of(path, text).mean(0))).max() <= 1e-4
    assert answer.usage.prompt_tokens == sum(map(len, texts))


def test_token_ids_are_taken_too(client: openai.OpenAI, server: RunningServer) -> None:
    tokens = httpx.post(f"{server.url}/tokenize", json={"prompt": TEXT}).json()["tokens"]
    of_text = client.embeddings.create(model="tiny", input=TEXT).data[0].embedding
    assert client.embeddings.create(model="tiny", input=tokens).data[0].embedding == pytest.approx(of_text, abs=1e-6)
    both = client.embeddings.create(model="tiny", input=[tokens, tokens[:4]]).data
    assert both[0].embedding == pytest.approx(of_text, abs=1e-6)
    assert both[1].embedding != pytest.approx(of_text, abs=1e-2)


def test_last_token_pooling_and_no_norm(client: openai.OpenAI, path: Path) -> None:
    states = states_of(path, TEXT)
    for pooling, expected in (("last", states[-1]), ("mean", states.mean(0))):
        for _ in range(2):  # the second time from the prefix cache, where it may
            answer = client.embeddings.create(
                model="tiny", input=TEXT, extra_body={"pooling": pooling, "normalize": False}
            )
            assert np.abs(np.array(answer.data[0].embedding) - expected).max() <= 1e-4


def test_fewer_dimensions_have_length_one(client: openai.OpenAI, path: Path) -> None:
    expected = unit(states_of(path, TEXT).mean(0)[:10])
    found = np.array(client.embeddings.create(model="tiny", input=TEXT, dimensions=10).data[0].embedding)
    assert found.shape == (10,)
    assert np.abs(found - expected).max() <= 1e-4
    assert np.linalg.norm(found) == pytest.approx(1, abs=1e-6)


def test_long_texts_are_cut_if_asked(client: openai.OpenAI) -> None:
    long = "x" * 600 + TEXT
    with pytest.raises(openai.BadRequestError) as caught:
        client.embeddings.create(model="tiny", input=["short", long])
    assert caught.value.param == "input.1"
    cut = client.embeddings.create(model="tiny", input=long, extra_body={"truncate_prompt_tokens": len(TEXT)})
    plain = client.embeddings.create(model="tiny", input=TEXT)
    assert cut.data[0].embedding == pytest.approx(plain.data[0].embedding, abs=1e-6)
    whole = client.embeddings.create(model="tiny", input=long, extra_body={"truncate_prompt_tokens": -1})
    assert whole.usage.prompt_tokens == 512


def test_beside_those_who_generate(client: openai.OpenAI, path: Path) -> None:
    def complete(_: int) -> str:
        answer = client.completions.create(model="tiny", prompt="import os", max_tokens=40, temperature=0)
        return answer.choices[0].text

    alone = complete(0)
    with ThreadPoolExecutor(4) as pool:
        generating = pool.map(complete, range(8))
        for _ in range(10):
            found = client.embeddings.create(model="tiny", input=TEXT).data[0].embedding
            assert np.abs(np.array(found) - unit(states_of(path, TEXT).mean(0))).max() <= 1e-4
        assert set(generating) == {alone}


def test_a_client_that_leaves_takes_its_texts_with_it(server: RunningServer) -> None:
    texts = [f"{i} " + "x" * 400 for i in range(300)]
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/v1/embeddings", json={"input": texts}, timeout=httpx.Timeout(5, read=0.1))
    limit_s = time.monotonic() + 30
    while (status := server.client.status()).num_running or status.num_free_blocks < status.num_blocks:
        assert time.monotonic() < limit_s
        assert httpx.post(f"{server.url}/v1/embeddings", json={"input": "x"}).status_code == 200


def test_timelines(client: openai.OpenAI) -> None:
    answer = client.embeddings.create(model="tiny", input=["a", "b"], extra_body={"penstock": {"timeline": True}})
    assert answer.model_extra is not None
    timelines = answer.model_extra["penstock"]["timeline"]
    assert [one["num_prompt_tokens"] for one in timelines] == [1, 1]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": ["a", ""]}, "input.1"),
        ({"input": [[1], []]}, "input.1"),
        ({"input": [VOCAB_SIZE]}, "input"),
        ({"input": 3}, "input"),
        ({"dimensions": 0}, "dimensions"),
        ({"dimensions": 65}, "dimensions"),
        ({"encoding_format": "binary"}, "encoding_format"),
        ({"pooling": "cls"}, "pooling"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"stream": True}, "stream"),
    ],
)
def test_what_is_wrong_is_named(server: RunningServer, body: dict[str, Any], param: str) -> None:
    answer = httpx.post(f"{server.url}/v1/embeddings", json={"input": TEXT, **body})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


def test_an_unknown_model_is_404(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="other", input=TEXT)


# ---- over an engine that says what it is told to


def vector(request: GenerateRequest) -> TokenDelta:
    length = len(request.prompt_token_ids)
    usage = Usage(num_prompt_tokens=length, num_cached_tokens=0, num_output_tokens=0)
    embedding = np.full(4, length, dtype="<f4").tobytes()
    return TokenDelta(request_id=request.request_id, finish_reason="length", usage=usage, embedding=embedding)


async def test_no_more_than_allowed_run_at_a_time() -> None:
    most = 0

    async def script(request: GenerateRequest) -> AsyncGenerator[TokenDelta, None]:
        nonlocal most
        most = max(most, engine.num_open)
        assert request.pooling == "mean"
        await asyncio.sleep(0)  # others may begin
        yield vector(request)

    engine = FakeEngine(script)
    async with http_over(engine, ServerConfig(max_prompts=3, max_inputs=20)) as http:
        body = {"input": [[1] * (1 + i) for i in range(20)], "normalize": False}
        answer = await http.post("/v1/embeddings", json=body)
        assert [one["embedding"][0] for one in answer.json()["data"]] == [1 + i for i in range(20)]
        assert most == 3
        refused = await http.post("/v1/embeddings", json={"input": ["x"] * 21})
        assert refused.status_code == 400
        assert "at most 20" in refused.json()["error"]["message"]
    assert engine.num_open == 0


async def test_the_failure_of_one_is_the_failure_of_all() -> None:
    async def script(request: GenerateRequest) -> AsyncGenerator[TokenDelta, None]:
        if len(request.prompt_token_ids) == 2:
            raise StepFailed("no")
        await asyncio.Event().wait()  # would never end by itself
        yield vector(request)

    engine = FakeEngine(script)
    async with http_over(engine, ServerConfig(max_prompts=2)) as http:
        answer = await http.post("/v1/embeddings", json={"input": [[1] * (1 + i) for i in range(9)]})
    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == StepFailed.code
    assert engine.num_open == 0
    assert len(engine.requests) <= 3
