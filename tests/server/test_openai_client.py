"""OpenAI's own client, both of it, over a real engine: every call it makes that a text model can answer."""

import inspect
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import httpx
import openai
import pytest
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from penstock.server.schemas import LATER, ChatCompletionRequest, CompletionRequest
from tests.servers import RunningServer
from tests.tiny_models import reference_greedy

HELLO: list[Any] = [{"role": "user", "content": "hello"}]
GREEDY: dict[str, Any] = {"temperature": 0, "extra_body": {"ignore_eos": True}}


class Caller(Protocol):
    """One of the SDK's two clients, with streams taken whole."""

    async def models(self) -> list[Model]: ...
    async def model(self, name: str) -> Model: ...
    async def complete(self, **request: Any) -> Completion: ...
    async def stream_completion(self, **request: Any) -> list[Completion]: ...
    async def chat(self, **request: Any) -> ChatCompletion: ...
    async def stream_chat(self, **request: Any) -> list[ChatCompletionChunk]: ...


class SyncCaller:
    def __init__(self, client: openai.OpenAI) -> None:
        self._client = client

    async def models(self) -> list[Model]:
        return list(self._client.models.list())

    async def model(self, name: str) -> Model:
        return self._client.models.retrieve(name)

    async def complete(self, **request: Any) -> Completion:
        answer: Completion = self._client.completions.create(model="tiny", **request)
        return answer

    async def stream_completion(self, **request: Any) -> list[Completion]:
        return list(self._client.completions.create(model="tiny", stream=True, **request))

    async def chat(self, **request: Any) -> ChatCompletion:
        answer: ChatCompletion = self._client.chat.completions.create(model="tiny", **request)
        return answer

    async def stream_chat(self, **request: Any) -> list[ChatCompletionChunk]:
        return list(self._client.chat.completions.create(model="tiny", stream=True, **request))


class AsyncCaller:
    def __init__(self, client: openai.AsyncOpenAI) -> None:
        self._client = client

    async def models(self) -> list[Model]:
        return [model async for model in self._client.models.list()]

    async def model(self, name: str) -> Model:
        return await self._client.models.retrieve(name)

    async def complete(self, **request: Any) -> Completion:
        answer: Completion = await self._client.completions.create(model="tiny", **request)
        return answer

    async def stream_completion(self, **request: Any) -> list[Completion]:
        return [chunk async for chunk in await self._client.completions.create(model="tiny", stream=True, **request)]

    async def chat(self, **request: Any) -> ChatCompletion:
        answer: ChatCompletion = await self._client.chat.completions.create(model="tiny", **request)
        return answer

    async def stream_chat(self, **request: Any) -> list[ChatCompletionChunk]:
        stream = await self._client.chat.completions.create(model="tiny", stream=True, **request)
        return [chunk async for chunk in stream]


@pytest.fixture(params=["sync", "async"])
async def caller(request: pytest.FixtureRequest, server: RunningServer) -> AsyncIterator[Caller]:
    url = f"{server.url}/v1"
    if request.param == "sync":
        with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
            yield SyncCaller(client)
    else:
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as async_client:
            yield AsyncCaller(async_client)


def is_whole(answer: openai.BaseModel) -> openai.BaseModel:
    """Check an answer against the SDK's own types, which it does not do by itself; return the answer."""
    return type(answer).model_validate(answer.model_dump(exclude_unset=True), strict=True)


def content(answer: ChatCompletion) -> list[str]:
    return [choice.message.content or "" for choice in answer.choices]


def joined(chunks: list[ChatCompletionChunk], num_choices: int = 1) -> list[str]:
    texts = [""] * num_choices
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    return texts


# ---- models


async def test_models(caller: Caller) -> None:
    models = await caller.models()
    assert [model.id for model in models] == ["tiny", "alias"]
    for model in models:
        is_whole(model)
        assert (model.object, model.owned_by) == ("model", "penstock")
        assert await caller.model(model.id) == model
    with pytest.raises(openai.NotFoundError, match="no model 'organisation/other'") as caught:
        await caller.model("organisation/other")
    assert caught.value.code == "model_not_found"


# ---- completions


def ids(server: RunningServer, text: str) -> list[int]:
    tokens: list[int] = httpx.post(f"{server.url}/tokenize", json={"prompt": text}).json()["tokens"]
    return tokens


def text_of(server: RunningServer, tokens: list[int]) -> str:
    text: str = httpx.post(f"{server.url}/detokenize", json={"tokens": tokens}).json()["prompt"]
    return text


async def test_every_kind_of_prompt(caller: Caller, server: RunningServer, checkpoint: Callable[[str], Path]) -> None:
    texts = ["def f(x):", "ab"]
    tokens = [ids(server, text) for text in texts]
    expected = [text_of(server, reference_greedy(checkpoint("llama"), one, 6)) for one in tokens]
    for prompt, num_prompts in (
        (texts[0], 1),
        (texts[:1], 1),
        (texts, 2),
        (tokens[0], 1),
        (tokens[:1], 1),
        (tokens, 2),
    ):
        request: dict[str, Any] = {
            "prompt": prompt,
            "max_tokens": 6,
            "extra_body": {"ignore_eos": True, "skip_special_tokens": False},
        }
        answer = await caller.complete(**request, temperature=0)
        is_whole(answer)
        assert (answer.object, answer.model) == ("text_completion", "tiny")
        assert [choice.index for choice in answer.choices] == list(range(num_prompts))
        assert [choice.text for choice in answer.choices] == expected[:num_prompts]
        assert answer.usage is not None
        num_tokens = sum(map(len, tokens[:num_prompts]))
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (num_tokens, 6 * num_prompts)
        assert answer.usage.total_tokens == num_tokens + 6 * num_prompts


async def test_sixteen_tokens_unless_told_otherwise(caller: Caller) -> None:
    answer = await caller.complete(prompt="abc", **GREEDY)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 16
    assert answer.choices[0].finish_reason == "length"


async def test_each_prompt_has_its_choices_in_order(caller: Caller) -> None:
    request: dict[str, Any] = {"prompt": ["one", "two"], "n": 2, "max_tokens": 8, "seed": 3}
    answer = await caller.complete(**request)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert len({choice.text for choice in answer.choices}) == 4
    chunks = await caller.stream_completion(**request)
    texts, reasons = [""] * 4, [0] * 4
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            reasons[choice.index] += bool(choice.finish_reason)
    assert texts == [choice.text for choice in answer.choices]
    assert reasons == [1, 1, 1, 1]
    # Prompt tokens count once, however many choices they have.
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 6


@pytest.mark.parametrize("num_alternatives", [0, 2, 5])
async def test_completion_logprobs(caller: Caller, num_alternatives: int) -> None:
    request: dict[str, Any] = {"prompt": "abc", "max_tokens": 6, "logprobs": num_alternatives, "seed": 1}
    answer = await caller.complete(**request, extra_body={"ignore_eos": True})
    is_whole(answer)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert logprobs.token_logprobs is not None
    assert logprobs.top_logprobs is not None
    assert logprobs.text_offset is not None
    assert [len(logprobs.tokens), len(logprobs.token_logprobs), len(logprobs.top_logprobs)] == [6, 6, 6]
    assert logprobs.text_offset == [sum(map(len, logprobs.tokens[:i])) for i in range(6)]
    for token, logprob, top in zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
        assert logprob <= 0
        # The chosen token is always among them; several that are halves of characters look alike.
        assert token in top
        assert 1 <= len(top) <= num_alternatives + 1
        assert max(top.values()) >= logprob
    parts = [
        choice.logprobs
        for chunk in await caller.stream_completion(**request, extra_body={"ignore_eos": True})
        for choice in chunk.choices
    ]
    streamed = [part for part in parts if part is not None]
    assert [token for part in streamed for token in part.tokens or []] == logprobs.tokens
    assert [offset for part in streamed for offset in part.text_offset or []] == logprobs.text_offset
    assert [value for part in streamed for value in part.token_logprobs or []] == pytest.approx(logprobs.token_logprobs)


@pytest.mark.parametrize("refused", [{"suffix": "end"}])
async def test_what_completions_do_not_have_yet_is_refused_by_name(caller: Caller, refused: dict[str, Any]) -> None:
    (name,) = refused
    for call in (caller.complete, caller.stream_completion):
        with pytest.raises(openai.BadRequestError, match=f"{name} is not supported yet") as caught:
            await call(prompt="abc", **refused)
        assert caught.value.param == name


# ---- chat


async def test_chat_whole_and_streamed(caller: Caller) -> None:
    request: dict[str, Any] = {"messages": HELLO, "max_tokens": 12, **GREEDY}
    answer = await caller.chat(**request)
    is_whole(answer)
    assert (answer.object, answer.model) == ("chat.completion", "tiny")
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    chunks = await caller.stream_chat(**request)
    for chunk in chunks:
        is_whole(chunk)
        assert chunk.usage is None
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == "length"
    assert joined(chunks) == content(answer)


@pytest.mark.parametrize("num_choices", [1, 3])
async def test_usage_comes_with_a_stream_that_asks_for_it(caller: Caller, num_choices: int) -> None:
    request: dict[str, Any] = {"messages": HELLO, "max_tokens": 5, "n": num_choices, **GREEDY}
    whole = await caller.chat(**request)
    *chunks, last = await caller.stream_chat(**request, stream_options={"include_usage": True})
    assert all(chunk.usage is None and chunk.choices for chunk in chunks)
    assert last.choices == []
    assert last.usage is not None
    assert whole.usage is not None
    assert last.usage.prompt_tokens == whole.usage.prompt_tokens
    assert last.usage.completion_tokens == whole.usage.completion_tokens == 5 * num_choices


async def test_several_choices_stream_side_by_side(caller: Caller) -> None:
    request: dict[str, Any] = {"messages": HELLO, "max_tokens": 10, "n": 3, "seed": 11}
    whole = await caller.chat(**request)
    assert [choice.index for choice in whole.choices] == [0, 1, 2]
    chunks = await caller.stream_chat(**request)
    assert joined(chunks, 3) == content(whole)
    assert len(set(content(whole))) == 3
    for index in range(3):
        deltas = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
        assert [choice.delta.role for choice in deltas if choice.delta.role] == ["assistant"]
        assert deltas[0].delta.role == "assistant"
        assert [choice.finish_reason for choice in deltas if choice.finish_reason] == [deltas[-1].finish_reason]


@pytest.mark.parametrize("num_alternatives", [None, 0, 3])
async def test_chat_logprobs(caller: Caller, num_alternatives: int | None) -> None:
    request: dict[str, Any] = {
        "messages": HELLO,
        "max_tokens": 5,
        "logprobs": True,
        "seed": 2,
        "extra_body": {"ignore_eos": True},
    }
    if num_alternatives is not None:
        request["top_logprobs"] = num_alternatives
    answer = await caller.chat(**request)
    is_whole(answer)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert len(logprobs.content) == 5
    for token in logprobs.content:
        assert token.logprob <= 0
        assert bytes(token.bytes or []).decode(errors="replace") == token.token
        assert len(token.top_logprobs) == (num_alternatives or 0)
        values = [other.logprob for other in token.top_logprobs]
        assert values == sorted(values, reverse=True)
        assert all(value >= token.logprob for value in values) or token.token in [o.token for o in token.top_logprobs]
    streamed = [
        token
        for chunk in await caller.stream_chat(**request)
        for choice in chunk.choices
        if choice.logprobs is not None
        for token in choice.logprobs.content or []
    ]
    assert [token.token for token in streamed] == [token.token for token in logprobs.content]
    assert [token.logprob for token in streamed] == pytest.approx([token.logprob for token in logprobs.content])


async def test_no_logprobs_unless_asked(caller: Caller) -> None:
    assert (await caller.chat(messages=HELLO, max_tokens=2)).choices[0].logprobs is None
    assert (await caller.complete(prompt="a", max_tokens=2)).choices[0].logprobs is None


@pytest.mark.parametrize("kind", ["string", "list"])
async def test_stop_strings(caller: Caller, kind: str) -> None:
    request: dict[str, Any] = {"messages": HELLO, "max_tokens": 40, **GREEDY}
    (whole,) = content(await caller.chat(**request))
    stop = whole[6:8]
    given = stop if kind == "string" else ["never to be seen", stop]
    answer = await caller.chat(**request, stop=given)
    assert answer.choices[0].finish_reason == "stop"
    assert content(answer) == [whole[: whole.index(stop)]]
    chunks = await caller.stream_chat(**request, stop=given)
    assert joined(chunks) == content(answer)
    assert chunks[-1].choices[0].finish_reason == "stop"


async def test_seeds_decide(caller: Caller) -> None:
    async def once(seed: int | None) -> str:
        return content(await caller.chat(messages=HELLO, max_tokens=16, seed=seed, temperature=1))[0]

    assert await once(5) == await once(5)
    assert await once(5) != await once(6)
    assert await once(None) != await once(None)
    chunks = await caller.stream_chat(messages=HELLO, max_tokens=16, seed=5, temperature=1)
    assert joined(chunks) == [await once(5)]


@pytest.mark.parametrize(
    "given", [{"max_completion_tokens": 7}, {"max_tokens": 7}, {"max_completion_tokens": 7, "max_tokens": 9}]
)
async def test_both_names_of_the_longest_answer(caller: Caller, given: dict[str, int]) -> None:
    answer = await caller.chat(messages=HELLO, **given, **GREEDY)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 7


async def test_answers_go_back_in_as_they_came_out(caller: Caller) -> None:
    messages: list[Any] = list(HELLO)
    for question in ("and then?", "and now?"):
        answer = await caller.chat(messages=messages, max_tokens=3, **GREEDY)
        messages += [answer.choices[0].message, {"role": "user", "content": question}]
    assert content(await caller.chat(messages=messages, max_tokens=3, **GREEDY))


async def test_every_role_and_both_forms_of_content(caller: Caller) -> None:
    plain = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "one two", "name": "Ada"},
        {"role": "assistant", "content": "three"},
        {"role": "user", "content": "four"},
    ]
    parts = [
        {**turn, "content": [{"type": "text", "text": piece} for piece in ("", turn["content"])]} for turn in plain
    ]
    parts[0]["role"] = "developer"
    answers = [await caller.chat(messages=messages, max_tokens=6, **GREEDY) for messages in (plain, parts)]
    assert content(answers[0]) == content(answers[1])
    assert len({answer.usage and answer.usage.prompt_tokens for answer in answers}) == 1


async def test_null_means_not_given(caller: Caller) -> None:
    nulls = dict.fromkeys(
        (
            "n",
            "max_tokens",
            "temperature",
            "top_p",
            "stop",
            "seed",
            "logit_bias",
            "presence_penalty",
            "frequency_penalty",
            "user",
            "stream_options",
        )
    )
    chat = await caller.chat(
        messages=HELLO,
        **{**nulls, "max_tokens": 2},
        logprobs=None,
        top_logprobs=None,
        metadata=None,
        response_format=None,
    )
    assert len(chat.choices) == 1
    answer = await caller.complete(prompt="abc", **nulls | {"max_tokens": 2}, logprobs=None)
    assert len(answer.choices) == 1


# ---- what there is not


SDK_ONLY = {"self", "extra_headers", "extra_query", "extra_body", "timeout"}
A_VALUE: dict[str, Any] = {
    "audio": {"voice": "alloy", "format": "wav"},
    "function_call": "none",
    "functions": [{"name": "f"}],
    "modalities": ["text", "audio"],
    "moderation": {"model": "m"},
    "prediction": {"type": "content", "content": "x"},
    "prompt_cache_options": {},
    "prompt_cache_retention": "24h",
    "service_tier": "flex",
    "store": True,
    "suffix": "end",
    "verbosity": "low",
    "web_search_options": {},
}


def missing() -> Iterator[tuple[str, str]]:
    client = openai.OpenAI(api_key="none")
    for endpoint, create, schema in (
        ("complete", client.completions.create, CompletionRequest),
        ("chat", client.chat.completions.create, ChatCompletionRequest),
    ):
        for name in sorted(inspect.signature(create).parameters.keys() - SDK_ONLY - schema.model_fields.keys()):
            yield endpoint, name


@pytest.mark.parametrize(("endpoint", "name"), list(missing()))
async def test_every_parameter_of_the_sdk_is_taken_or_refused_by_name(caller: Caller, endpoint: str, name: str) -> None:
    needed: dict[str, Any] = {"prompt": "abc"} if endpoint == "complete" else {"messages": HELLO}
    with pytest.raises(openai.BadRequestError) as caught:
        await getattr(caller, endpoint)(**needed, extra_body={name: A_VALUE.get(name, 1)})
    assert caught.value.param == name
    assert name in caught.value.message
    assert ("is not supported yet" if name in LATER else "unknown parameter") in caught.value.message


IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
AUDIO = {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}


@pytest.mark.parametrize(
    ("change", "param", "value"),
    [
        ({"response_format": {"type": "grammar"}}, "response_format", "grammar"),
        ({"messages": [{"role": "user", "content": [IMAGE]}]}, "messages.0.content.0.image_url", "sees no images"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "see"}, AUDIO]}]},
            "messages.0.content.1",
            "input_audio",
        ),
        ({"modalities": ["text", "audio"]}, "modalities", "modalities"),
    ],
)
async def test_what_a_text_model_cannot_do_is_refused_where_it_stands(
    caller: Caller, change: dict[str, Any], param: str, value: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        await caller.chat(**{"messages": HELLO, **change})
    assert caught.value.param == param
    assert value in caught.value.message


# ---- errors


@pytest.mark.parametrize("stream", [False, True])
async def test_errors_are_the_sdks_own(caller: Caller, stream: bool) -> None:
    chat = caller.stream_chat if stream else caller.chat
    with pytest.raises(openai.BadRequestError) as bad:
        await chat(messages=HELLO, temperature=3)
    assert (bad.value.status_code, bad.value.param, bad.value.type) == (400, "temperature", "invalid_request_error")
    assert "temperature is 3" in bad.value.message
    with pytest.raises(openai.BadRequestError) as long:
        await chat(messages=[{"role": "user", "content": "x" * 600}])
    assert (long.value.code, long.value.param) == ("context_length_exceeded", "messages")
    with pytest.raises(openai.NotFoundError) as model:
        await chat(messages=HELLO, extra_body={"model": "gpt-9"})
    assert (model.value.code, model.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.APIStatusError) as large:
        await chat(messages=[{"role": "user", "content": "x" * 300_000}])
    assert (large.value.status_code, large.value.code) == (413, "request_too_large")
    with pytest.raises(openai.InternalServerError) as late:
        await chat(messages=HELLO, extra_body={"penstock": {"deadline_s": 1e-9}})
    assert (late.value.status_code, late.value.code) == (504, "deadline_unmeetable")
    assert int(late.value.response.headers["retry-after"]) >= 1
    for error in (bad, long, model, large, late):
        assert error.value.request_id


async def test_the_clients_own_id_comes_back_in_answers_and_errors(server: RunningServer) -> None:
    headers = {"x-request-id": "mine-17"}
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", default_headers=headers) as client:
        answer = await client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=1)
        assert answer._request_id == "mine-17"
        with pytest.raises(openai.BadRequestError) as caught:
            await client.chat.completions.create(model="tiny", messages=[])
    assert caught.value.request_id == "mine-17"


async def test_a_client_that_gives_up_raises_its_own_timeout(server: RunningServer) -> None:
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        with pytest.raises(openai.APITimeoutError):
            await client.chat.completions.create(model="tiny", messages=HELLO, n=4, timeout=0.02, **GREEDY)
