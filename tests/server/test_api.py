"""The API as the openai client and curl see it, over a real engine."""

import asyncio
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.servers import RunningServer
from tests.tiny_models import reference_greedy

MESSAGES: list[Any] = [{"role": "user", "content": "hello"}]
GREEDY: dict[str, Any] = {"temperature": 0, "extra_body": {"ignore_eos": True}}


def test_models_are_listed_under_every_name(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny", "alias"]
    assert client.models.retrieve("alias").id == "alias"
    with pytest.raises(openai.NotFoundError, match="no model 'other'"):
        client.models.retrieve("other")


def test_completion_equals_the_reference(
    client: openai.OpenAI, server: RunningServer, checkpoint: Callable[[str], Path]
) -> None:
    prompt = list(b"def f(x):")
    answer = client.completions.create(model="tiny", prompt=prompt, max_tokens=10, logprobs=0, **GREEDY)
    expected = reference_greedy(checkpoint("llama"), prompt, 10)
    text = httpx.post(f"{server.url}/detokenize", json={"tokens": expected}).json()["prompt"]
    assert answer.choices[0].text == text
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 10
    assert answer.choices[0].logprobs is not None
    assert len(answer.choices[0].logprobs.tokens or []) == 10


def test_streamed_text_is_the_whole_text(client: openai.OpenAI) -> None:
    request: dict[str, Any] = {"model": "tiny", "messages": MESSAGES, "max_tokens": 30, **GREEDY}
    whole = client.chat.completions.create(**request)
    chunks = list(client.chat.completions.create(**request, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    reasons = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices]
    assert reasons.count("length") == 1
    assert [reason for reason in reasons if reason] == ["length"]
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 30


async def test_the_async_client_streams_many_at_once(server: RunningServer) -> None:
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:

        async def one(seed: int) -> str:
            stream = await client.chat.completions.create(
                model="tiny", messages=MESSAGES, max_tokens=20, seed=seed % 2, stream=True
            )
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices])

        answers = await asyncio.gather(*(one(seed) for seed in range(16)))
    assert len(set(answers[0::2])) == len(set(answers[1::2])) == 1
    assert answers[0] != answers[1]


def test_prompts_times_choices_have_their_own_indices(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="tiny", prompt=["one", "two", "three"], n=2, max_tokens=4, **GREEDY)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3, 4, 5]
    assert answer.choices[0].text == answer.choices[1].text
    chunks = client.completions.create(
        model="tiny", prompt=["one", "two", "three"], n=2, max_tokens=4, stream=True, **GREEDY
    )
    texts = [""] * 6
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == [choice.text for choice in answer.choices]


def test_chat_logprobs_carry_bytes_and_alternatives(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=5, logprobs=True, top_logprobs=3, **GREEDY
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert len(logprobs.content) == 5
    for token in logprobs.content:
        assert len(token.top_logprobs) == 3
        assert token.logprob == max(other.logprob for other in token.top_logprobs)


def test_stop_strings_end_the_text_before_them(client: openai.OpenAI) -> None:
    request: dict[str, Any] = {"model": "tiny", "prompt": "abc", "max_tokens": 60, **GREEDY}
    whole = client.completions.create(**request).choices[0].text
    stop = whole[7:9]
    cut = client.completions.create(**request, stop=[stop, "never"]).choices[0]
    assert cut.finish_reason == "stop"
    assert cut.text == whole[: whole.index(stop)]


def test_a_timeline_comes_back_when_asked_for(server: RunningServer) -> None:
    body = {"messages": MESSAGES, "max_tokens": 3, "penstock": {"timeline": True, "priority": "P1", "tenant": "a"}}
    (timeline,) = httpx.post(f"{server.url}/v1/chat/completions", json=body).json()["penstock"]["timeline"]
    assert 0 <= timeline["admitted_s"] <= timeline["first_token_s"] <= timeline["finished_s"]


@pytest.mark.parametrize(
    ("change", "param", "message"),
    [
        ({"tools": []}, "tools", "not supported yet"),
        ({"guided_json": {}}, "guided_json", "not supported yet"),
        ({"nonsense": 1}, "nonsense", "unknown parameter"),
        ({"temperature": 3}, "temperature", "less than or equal to 2"),
        ({"temperature": "hot"}, "temperature", "valid number"),
        ({"n": 5}, "n", "at most 4"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": [{"role": "user"}]}, "messages.0.content", "missing"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": 100_000}, "max_tokens", "lower max_tokens"),
        ({"top_logprobs": 2}, "top_logprobs", "needs logprobs"),
        ({"logprobs": True, "top_logprobs": 6}, "top_logprobs", "at most 5"),
        ({"stop": ""}, "stop", "empty"),
        ({"stop": ["a"] * 17}, "stop", "17 stop strings"),
        ({"logit_bias": {"99999": 1}}, "logit_bias", "not in the vocabulary"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream"),
        ({"penstock": {"priority": "P9"}}, "penstock.priority", "P0"),
        ({"response_format": {"type": "json_object"}}, "response_format.type", "text"),
    ],
)
def test_bad_parameters_are_named(server: RunningServer, change: dict[str, Any], param: str, message: str) -> None:
    response = httpx.post(f"{server.url}/v1/chat/completions", json={"messages": MESSAGES, **change})
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == param
    assert message in error["message"]
    assert error["type"] == "invalid_request_error"


def test_other_faults_have_the_same_shape(server: RunningServer) -> None:
    url = f"{server.url}/v1/chat/completions"
    answers = {
        "json": httpx.post(url, content=b"{nope", headers={"content-type": "application/json"}),
        "path": httpx.get(f"{server.url}/v2/nothing"),
        "method": httpx.get(url),
        "model": httpx.post(url, json={"messages": MESSAGES, "model": "gpt-9"}),
        "large": httpx.post(url, json={"messages": [{"role": "user", "content": "x" * 300_000}]}),
        "long": httpx.post(url, json={"messages": [{"role": "user", "content": "x" * 3_000}]}),
        "deadline": httpx.post(url, json={"messages": MESSAGES, "penstock": {"deadline_s": 1e-9}}),
    }
    statuses = {name: answer.status_code for name, answer in answers.items()}
    assert statuses == {
        "json": 400,
        "path": 404,
        "method": 405,
        "model": 404,
        "large": 413,
        "long": 400,
        "deadline": 504,
    }
    for answer in answers.values():
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert answers["long"].json()["error"]["code"] == "context_length_exceeded"
    assert int(answers["deadline"].headers["retry-after"]) >= 1


def test_request_ids_are_echoed_or_made(server: RunningServer) -> None:
    url = f"{server.url}/version"
    assert httpx.get(url, headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"
    assert httpx.get(url, headers={"x-request-id": "bad id"}).headers["x-request-id"] != "bad id"


def test_tokenize_and_back(server: RunningServer) -> None:
    tokens = httpx.post(f"{server.url}/tokenize", json={"prompt": "héllo"}).json()
    assert tokens["count"] == len(tokens["tokens"]) == 6
    assert httpx.post(f"{server.url}/detokenize", json={"tokens": tokens["tokens"]}).json() == {"prompt": "héllo"}
    chat = httpx.post(f"{server.url}/tokenize", json={"messages": MESSAGES}).json()
    assert chat["count"] > 6


def test_health_and_metrics(server: RunningServer) -> None:
    for path in ("/health", "/health/live", "/health/ready", "/healthz", "/readyz", "/ping"):
        assert httpx.get(server.url + path).status_code == 200
    text = httpx.get(f"{server.url}/metrics").text
    for name in (
        "vllm:num_requests_running",
        "vllm:kv_cache_usage_perc",
        "vllm:prefix_cache_hits_total",
        'vllm:request_success_total{finished_reason="length"}',
        "vllm:time_to_first_token_seconds_bucket",
        "vllm:inter_token_latency_seconds_bucket",
        'vllm:cache_config_info{block_size="4",num_gpu_blocks="1024"}',
        'penstock_http_requests_total{code="200",method="POST",route="/v1/chat/completions"}',
    ):
        assert name in text, name


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_blocks(server: RunningServer, stream: bool) -> None:
    body = {"prompt": "a" * 50, "max_tokens": 440, "ignore_eos": True, "stream": stream, "n": 4}
    raw = json.dumps(body).encode()
    with (
        httpx.Client() as client,
        client.stream(
            "POST",
            f"{server.url}/v1/completions",
            content=raw,
            headers={"content-type": "application/json"},
            timeout=None,
        )
        if stream
        else httpx.Client() as response,
    ):
        if stream:
            assert isinstance(response, httpx.Response)
            next(response.iter_bytes())
        else:
            assert isinstance(response, httpx.Client)
            with pytest.raises(httpx.ReadTimeout):
                response.post(f"{server.url}/v1/completions", json=body, timeout=0.3)
    limit_s = time.monotonic() + 30
    while (status := server.client.status()).num_running or status.num_free_blocks < status.num_blocks:
        # Whoever is left would keep the engine stepping; an idle one tells its state with the next request.
        httpx.post(f"{server.url}/v1/completions", json={"prompt": "x", "max_tokens": 1})
        assert time.monotonic() < limit_s, status
