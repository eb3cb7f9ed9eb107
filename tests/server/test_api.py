"""The API beyond OpenAI's own, over a real engine; ``test_openai_client`` has the rest."""

import asyncio
import json
import time
from typing import Any

import httpx
import openai
import pytest

from tests.servers import RunningServer

MESSAGES: list[Any] = [{"role": "user", "content": "hello"}]


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


def test_a_timeline_comes_back_when_asked_for(server: RunningServer) -> None:
    for path, body in (
        ("chat/completions", {"messages": MESSAGES, "max_tokens": 3}),
        ("messages", {"messages": MESSAGES, "max_tokens": 3}),
        ("responses", {"input": "hello", "max_output_tokens": 3}),
    ):
        assert "penstock" not in httpx.post(f"{server.url}/v1/{path}", json=body).json()
        wanted = {**body, "penstock": {"timeline": True, "priority": "P1", "deadline_s": 60, "tenant": "a"}}
        (timeline,) = httpx.post(f"{server.url}/v1/{path}", json=wanted).json()["penstock"]["timeline"]
        assert 0 <= timeline["admitted_s"] <= timeline["first_token_s"] <= timeline["finished_s"]


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


def test_tokenize_and_back(server: RunningServer) -> None:
    tokens = httpx.post(f"{server.url}/tokenize", json={"prompt": "héllo"}).json()
    assert tokens["count"] == len(tokens["tokens"]) == 6
    assert httpx.post(f"{server.url}/detokenize", json={"tokens": tokens["tokens"]}).json() == {"prompt": "héllo"}
    chat = httpx.post(f"{server.url}/tokenize", json={"messages": MESSAGES}).json()
    assert chat["count"] > 6


def test_health_and_metrics(server: RunningServer) -> None:
    for path in ("/health", "/health/live", "/health/ready", "/healthz", "/readyz", "/ping"):
        assert httpx.get(server.url + path).status_code == 200
        head = httpx.head(server.url + path)
        assert (head.status_code, head.content) == (200, b"")
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
    # The cache holds about eight such answers at once: all of them take seconds, and the client leaves long before.
    body = {"prompt": ["a" * 50] * 16, "max_tokens": 440, "ignore_eos": True, "stream": stream, "n": 4}
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
            assert response.status_code == 200, response.read()
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


@pytest.mark.parametrize("stream", [True, False])
def test_half_a_character_shows_only_where_the_answer_ends_in_it(client: openai.OpenAI, stream: bool) -> None:
    request: dict[str, Any] = {
        "model": "tiny",
        "prompt": "x",
        "stream": stream,
        "seed": 3,
        # So long that no end is made up for what is cut.
        "extra_body": {"structured_outputs": {"regex": "(é|€|👍){3000}"}},
    }

    def pieces(max_tokens: int) -> list[str]:
        answer = client.completions.create(**request, max_tokens=max_tokens)
        return [chunk.choices[0].text for chunk in answer] if stream else [answer.choices[0].text]

    text = "".join(pieces(20)).rstrip("\ufffd")
    assert len(text) >= 5
    assert "\ufffd" not in text
    for num_bytes in range(1, len(text.encode())):
        *before, last = pieces(num_bytes)
        shown = text.encode()[:num_bytes].decode(errors="ignore")
        is_cut = shown.encode() != text.encode()[:num_bytes]
        assert "".join(before) + last == shown + "\ufffd" * is_cut
        assert "\ufffd" not in "".join(before)


def test_who_calls_and_what_a_router_may_keep_together_changes_nothing(client: openai.OpenAI) -> None:
    request: dict[str, Any] = {"model": "tiny", "messages": MESSAGES, "temperature": 0, "max_tokens": 5}
    plain = client.chat.completions.create(**request)
    named = client.chat.completions.create(**request, safety_identifier="someone", prompt_cache_key="a")
    assert named.choices[0].message == plain.choices[0].message
    assert named.usage is not None
    assert named.usage.prompt_tokens_details is not None
    assert named.usage.prompt_tokens_details.cached_tokens, "another key is no other cache; a salt is"
