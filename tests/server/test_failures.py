"""What clients see of everything that can go wrong behind the server, before and after the first byte."""

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

import httpx
import openai
import pytest
from structlog.testing import capture_logs

from penstock.errors import (
    ContextTooLong,
    DeadlineUnmeetable,
    Draining,
    InternalError,
    InvalidRequest,
    NotReady,
    OverLimit,
    Overloaded,
    PenstockError,
    StepFailed,
    WorkerDied,
)
from penstock.protocol import Candidate, EngineState, GenerateRequest, TokenDelta, TokenLogprobs
from tests.server.fakes import TOKENIZER, FakeEngine, delta, http_over, openai_over

CHAT: dict[str, Any] = {"model": "fake", "messages": [{"role": "user", "content": "hello"}]}
CHAT_PATH = "/v1/chat/completions"


def failing(error: Exception, num_good: int = 0) -> FakeEngine:
    """An engine that gives ``num_good`` tokens and then fails."""

    async def script(request: GenerateRequest) -> AsyncGenerator[TokenDelta, None]:
        for _ in range(num_good):
            yield delta(request, "ok ")
        raise error

    return FakeEngine(script)


def saying(*texts: str) -> FakeEngine:
    """An engine whose answers are these pieces."""

    async def script(request: GenerateRequest) -> AsyncGenerator[TokenDelta, None]:
        for text in texts[:-1]:
            yield delta(request, text)
        yield delta(request, texts[-1], "stop")

    return FakeEngine(script)


def events_of(response: httpx.Response) -> list[str]:
    assert response.headers["content-type"].startswith("text/event-stream")
    return [event.removeprefix("data: ") for event in response.text.split("\n\n") if event]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "kind", "status", "retry_after"),
    [
        (InvalidRequest("bad", param="n"), openai.BadRequestError, 400, None),
        (ContextTooLong("long", param="messages"), openai.BadRequestError, 400, None),
        (OverLimit("large", param="messages"), openai.APIStatusError, 413, None),
        (Overloaded("full", retry_after_s=1.2), openai.InternalServerError, 503, "2"),
        (NotReady("restarting", retry_after_s=1.0), openai.InternalServerError, 503, "1"),
        (Draining("going", retry_after_s=0.1), openai.InternalServerError, 503, "1"),
        (DeadlineUnmeetable("late", retry_after_s=30.0), openai.InternalServerError, 504, "30"),
        (WorkerDied("died", retry_after_s=1.0), openai.InternalServerError, 500, "1"),
        (StepFailed("failed"), openai.InternalServerError, 500, None),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
async def test_a_failure_before_the_first_byte_is_the_sdks_exception(
    error: PenstockError, kind: type[openai.APIStatusError], status: int, retry_after: str | None, stream: bool
) -> None:
    async with openai_over(failing(error)) as client:
        with pytest.raises(kind) as caught:
            await client.chat.completions.create(**CHAT, stream=stream)
    assert caught.value.status_code == status
    assert (caught.value.code, caught.value.param) == (error.code, error.param)
    assert isinstance(caught.value.body, dict)
    assert caught.value.body["message"] == error.message
    assert caught.value.response.headers.get("retry-after") == retry_after
    assert caught.value.request_id


@pytest.mark.parametrize("num_prompts", [1, 3])
@pytest.mark.parametrize("error", [StepFailed("the step failed"), KeyError("a fault of ours")])
async def test_a_failure_after_the_first_byte_is_one_typed_event_and_the_end(
    error: Exception, num_prompts: int
) -> None:
    engine = failing(error, num_good=2)
    body = {"prompt": ["x"] * num_prompts, "stream": True, "stream_options": {"include_usage": True}}
    async with http_over(engine) as client:
        with capture_logs() as logs:
            response = await client.post("/v1/completions", json=body)
    *good, last = events_of(response)
    assert response.status_code == 200
    assert good
    assert all("error" not in json.loads(event) for event in good)
    fault = json.loads(last)["error"]
    assert set(fault) == {"message", "type", "param", "code"}
    assert fault["type"] == "internal_error"
    expected = error.code if isinstance(error, PenstockError) else InternalError.code
    assert fault["code"] == expected
    assert logs[-1]["error"] == expected
    assert engine.num_open == 0


async def test_the_sdk_raises_what_a_stream_ends_with() -> None:
    async with openai_over(failing(WorkerDied("the engine died", retry_after_s=1.0), num_good=2)) as client:
        stream = await client.chat.completions.create(**CHAT, stream=True)
        texts = [(await anext(stream)).choices[0].delta.content for _ in range(3)]
        with pytest.raises(openai.APIError, match="the engine died") as caught:
            await anext(stream)
    assert texts == ["", "ok ", "ok "]
    assert caught.value.code == "worker_died"


@pytest.mark.parametrize("num_prompts", [1, 3])
async def test_a_fault_of_ours_is_a_500_that_names_the_request_and_nothing_else(num_prompts: int) -> None:
    engine = failing(KeyError("a secret of ours"), num_good=1)
    async with http_over(engine) as client:
        with capture_logs() as logs:
            response = await client.post(
                "/v1/completions", json={"prompt": ["a prompt"] * num_prompts}, headers={"x-request-id": "mine"}
            )
    assert response.status_code == 500
    assert response.headers["x-request-id"] == "mine"
    assert "secret" not in response.text
    assert response.json()["error"]["code"] == "internal_error"
    assert "a secret of ours" in logs[0]["exception"]
    assert "a prompt" not in str(logs)
    assert engine.num_open == 0


async def test_one_prompt_that_fails_ends_the_others() -> None:
    async def script(request: GenerateRequest) -> AsyncGenerator[TokenDelta, None]:
        if request.request_id.endswith("-1"):
            raise StepFailed("the second failed")
        yield delta(request, "ok")
        await asyncio.Event().wait()

    engine = FakeEngine(script)
    async with http_over(engine) as client:
        response = await client.post("/v1/completions", json={"prompt": ["a", "b", "c"]})
    assert response.json()["error"]["code"] == "step_failed"
    assert engine.num_open == 0


async def test_while_loading_every_route_says_so_and_when_to_come_back() -> None:
    engine = saying("x")
    engine.state = EngineState.LOADING
    async with http_over(engine) as client:
        answers = [
            await client.get("/v1/models"),
            await client.get("/v1/models/fake"),
            await client.post(CHAT_PATH, json=CHAT),
            await client.post("/v1/completions", json={"prompt": "x"}),
            await client.post("/tokenize", json={"prompt": "x"}),
            await client.post("/detokenize", json={"tokens": [1]}),
        ]
        for answer in answers:
            assert answer.status_code == 503
            assert answer.headers["retry-after"] == "3"
            assert answer.json()["error"]["code"] == "not_ready"
        for path in ("/health/ready", "/readyz", "/health"):
            answer = await client.get(path)
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        for path in ("/health/live", "/healthz", "/ping", "/metrics", "/version"):
            assert (await client.get(path)).status_code == 200


@pytest.mark.parametrize("state", list(EngineState))
async def test_ready_means_ready(state: EngineState) -> None:
    async with http_over(FakeEngine(saying("x").script, state)) as client:
        answer = await client.get("/health/ready")
    assert (answer.status_code == 200) == (state is EngineState.READY)
    assert answer.json()["status"] == state.value


async def test_the_sdk_tries_again_where_it_may() -> None:
    num_calls = 0

    async def script(request: GenerateRequest) -> AsyncGenerator[TokenDelta, None]:
        nonlocal num_calls
        num_calls += 1
        if num_calls == 1:
            raise Overloaded("full", retry_after_s=0.5)
        yield delta(request, "at last", "stop")

    async with openai_over(FakeEngine(script)) as client:
        answer = await client.with_options(max_retries=1).chat.completions.create(**CHAT)
    assert answer.choices[0].message.content == "at last"
    assert num_calls == 2


TRICKY = (
    "\u2028",
    "\u2029\x85",
    "a\nb\r\nc\rd",
    "data: [DONE]\n\n",
    '{"error": {"message": "no"}}',
    "\x0b\x0c\x1c\x00",
    "👍",
)


async def test_any_text_survives_the_stream() -> None:
    async with openai_over(saying(*TRICKY)) as client:
        stream = await client.chat.completions.create(**CHAT, stream=True)
        texts = [chunk.choices[0].delta.content or "" async for chunk in stream]
        assert "".join(texts) == "".join(TRICKY)
        whole = await client.chat.completions.create(**CHAT)
    assert whole.choices[0].message.content == "".join(TRICKY)


async def test_with_usage_to_come_every_other_chunk_says_it_has_none() -> None:
    async with http_over(saying("a", "b")) as client:
        body = {**CHAT, "stream": True}
        plain = events_of(await client.post(CHAT_PATH, json=body))
        counted = events_of(await client.post(CHAT_PATH, json={**body, "stream_options": {"include_usage": True}}))
        declined = events_of(await client.post(CHAT_PATH, json={**body, "stream_options": {"include_usage": False}}))
    assert plain[-1] == declined[-1] == counted[-1] == "[DONE]"
    assert all("usage" not in json.loads(event) for event in (*plain[:-1], *declined[:-1]))
    *others, last = [json.loads(event) for event in counted[:-1]]
    assert all(chunk["usage"] is None for chunk in others)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 1


async def test_alternatives_that_look_alike_keep_the_likeliest_and_the_chosen_one() -> None:
    halves = [TOKENIZER.encode(text, add_special_tokens=False)[0] for text in ("é", "你", "x")]
    assert [TOKENIZER.token_text(token_id) for token_id in halves] == ["\ufffd", "\ufffd", "x"]
    top = tuple(Candidate(token_id, -0.5 - rank, rank + 1) for rank, token_id in enumerate(halves[:2]))
    chosen = Candidate(halves[2], -float("inf"), 9)

    async def script(request: GenerateRequest) -> AsyncGenerator[TokenDelta, None]:
        yield delta(request, "x", "stop", logprobs=(TokenLogprobs(chosen, top),))

    async with openai_over(FakeEngine(script)) as client:
        answer = await client.completions.create(model="fake", prompt="x", logprobs=2)
        assert answer.choices[0].logprobs is not None
        assert answer.choices[0].logprobs.top_logprobs == [{"\ufffd": -0.5, "x": -9999.0}]
        chat = await client.chat.completions.create(**CHAT, logprobs=True, top_logprobs=2)
    assert chat.choices[0].logprobs is not None
    (token,) = chat.choices[0].logprobs.content or []
    assert (token.logprob, token.bytes) == (-9999.0, [120])
    assert [other.bytes for other in token.top_logprobs] == [list("é".encode()[:1]), list("你".encode()[:1])]
