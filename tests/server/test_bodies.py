"""Bodies that are wrong: a 400 that names the parameter, the value seen and what it may be, and at no great cost."""

import json
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import httpx
import pytest
from pydantic import BaseModel, ValidationError

from penstock.protocol import GenerateRequest, TokenDelta
from penstock.server import ServerConfig
from penstock.server.schemas import LATER, ChatCompletionRequest, CompletionRequest, DetokenizeRequest
from tests.server.fakes import MODEL, FakeEngine, delta, http_over

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
MESSAGES = [{"role": "user", "content": "hello"}]
JSON = {"content-type": "application/json"}


async def answer(request: GenerateRequest) -> AsyncGenerator[TokenDelta, None]:
    for index in range(request.sampling.n):
        yield delta(request, "fine", "stop", index=index)


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine(answer)


@pytest.fixture
async def client(engine: FakeEngine) -> AsyncIterator[httpx.AsyncClient]:
    config = ServerConfig(
        max_choices=4,
        max_logprobs=5,
        max_prompts=3,
        max_stop_strings=2,
        max_stop_chars=10,
        max_prompt_tokens=50,
        max_body_bytes=8 << 20,
    )
    async with http_over(engine, config) as client:
        yield client


def error_of(response: httpx.Response, status: int = 400) -> dict[str, Any]:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    return dict(error)


@pytest.mark.parametrize(
    ("change", "param", "message"),
    [
        ({"nonsense": 1}, "nonsense", "unknown parameter 'nonsense'"),
        ({"temperature": 3}, "temperature", "is 3: input should be less than or equal to 2"),
        ({"temperature": "hot"}, "temperature", 'is "hot": input should be a valid number'),
        ({"n": 0}, "n", "is 0: input should be greater than or equal to 1"),
        ({"n": True}, "n", "is true: input should be a valid integer"),
        ({"stream": "yes"}, "stream", 'is "yes": input should be a valid boolean'),
        ({"seed": 1.5}, "seed", "is 1.5: input should be a valid integer"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": 100_000}, "max_tokens", "lower max_tokens"),
        ({"max_completion_tokens": 100_000}, "max_completion_tokens", "lower max_completion_tokens"),
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens", "min_tokens is 9 and at most 8"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": 5}, "messages", "is 5: input should be a valid list"),
        ({"messages": [5]}, "messages.0", "must be a JSON object"),
        ({"messages": [{"role": "user"}]}, "messages.0.content", "is missing"),
        ({"messages": [{"role": "user", "content": None}]}, "messages.0.content", "is null"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content", "is 5: input should be a valid string"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages.0.content.0.text", "is missing"),
        ({"messages": [{"role": "cook", "content": "x"}]}, "messages.0.role", "'system', 'developer', 'user'"),
        ({"messages": [{**MESSAGES[0], "refusal": "no"}]}, "messages.0.refusal", 'is "no"'),
        ({"top_logprobs": 2}, "top_logprobs", "needs logprobs"),
        ({"stop": ""}, "stop", "empty"),
        ({"stop": 5}, "stop", "is 5"),
        ({"stop": ["a", 5]}, "stop.1", "is 5: input should be a valid string"),
        ({"logit_bias": {"99999": 1}}, "logit_bias", "token id 99999 is not in the vocabulary"),
        ({"logit_bias": {"a": 1}}, "logit_bias.a", 'is "a"'),
        ({"logit_bias": {"1": 101}}, "logit_bias.1", "less than or equal to 100"),
        ({"stop_token_ids": [99_999]}, "stop_token_ids", "token id 99999 is not in the vocabulary"),
        ({"stop_token_ids": [-1]}, "stop_token_ids.0", "is -1"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "needs stream"),
        ({"penstock": {"priority": "P9"}}, "penstock.priority", "is \"P9\": input should be 'P0', 'P1', 'P2' or 'P3'"),
        ({"penstock": {"urgency": 1}}, "penstock.urgency", "unknown parameter 'penstock.urgency'"),
        ({"penstock": None}, "penstock", "must be a JSON object"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs", "set by the conversation"),
        ({"user": "x" * 600}, "user", "is a text of 600 characters: string should have at most 512"),
        ({"user": "\ud800"}, "user", r'is "\ud800"'),
        ({"\ud800": 1}, None, "the body: input should be a valid string"),
        ({"\u2028": 1}, "\u2028", "unknown parameter"),
        ({"metadata": {"a": 1}}, "metadata.a", "is 1: input should be a valid string"),
        *(({name: {"a": 1}}, name, "is not supported yet; leave it out") for name in sorted(LATER)),
    ],
)
async def test_the_parameter_is_named(
    client: httpx.AsyncClient, change: dict[str, Any], param: str, message: str
) -> None:
    error = error_of(await client.post(CHAT, content=json.dumps({"messages": MESSAGES, **change}), headers=JSON))
    assert error["param"] == param
    assert message in error["message"]


@pytest.mark.parametrize("name", LATER)
async def test_what_is_not_supported_may_be_sent_if_it_asks_for_nothing(client: httpx.AsyncClient, name: str) -> None:
    for value in (None, *LATER[name]):
        response = await client.post(CHAT, json={"messages": MESSAGES, "max_tokens": 1, name: value})
        assert response.status_code == 200, response.text


@pytest.mark.parametrize(
    ("prompt", "param", "message"),
    [
        (5, "prompt", "is 5: it can be a string, a list of strings"),
        (None, "prompt", "is null: it can be"),
        ({"a": 1}, "prompt", "it can be"),
        ([], "prompt", "give at least one"),
        ([[]], "prompt", "the prompt is empty"),
        ([[1], []], "prompt", "the prompt is empty"),
        ([1, "a"], "prompt.1", 'is "a": input should be a valid integer'),
        (["a", 1], "prompt.1", "is 1: input should be a valid string"),
        ([[1], "a"], "prompt.1", 'is "a": input should be a valid list'),
        ([[1], [True]], "prompt.1.0", "is true: input should be a valid integer"),
        ([-1], "prompt.0", "greater than or equal to 0"),
        ([2**31], "prompt.0", "less than 2147483648"),
        ("\ud800", "prompt", "unicode"),
    ],
)
async def test_prompts_of_no_kind(client: httpx.AsyncClient, prompt: Any, param: str, message: str) -> None:
    error = error_of(await client.post(COMPLETIONS, content=json.dumps({"prompt": prompt}), headers=JSON))
    assert error["param"] == param
    assert message in error["message"]


@pytest.mark.parametrize("prompt", ["", [""], ["x", ""]])
async def test_text_without_tokens(client: httpx.AsyncClient, prompt: Any) -> None:
    error = error_of(await client.post(COMPLETIONS, json={"prompt": prompt, "add_special_tokens": False}))
    assert (error["param"], "the prompt is empty" in error["message"]) == ("prompt", True)
    # This tokenizer begins every text with a token.
    assert (await client.post(COMPLETIONS, json={"prompt": prompt})).status_code == 200


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({}, "prompt", "is missing"),
        ({"prompt": 5}, "prompt", "is 5: input should be a valid string"),
        ({"messages": 5}, "messages", "is 5: input should be a valid list"),
        ({"messages": MESSAGES, "prompt": "x"}, "prompt", "unknown parameter"),
    ],
)
async def test_tokenize_complains_about_what_was_meant(
    client: httpx.AsyncClient, body: dict[str, Any], param: str, message: str
) -> None:
    error = error_of(await client.post("/tokenize", json=body))
    assert error["param"] == param
    assert message in error["message"]


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "the body is missing"),
        (b"{nope", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"n": ' + b"1" * 5000 + b"}", "not valid JSON"),
        (b"[]", "the body must be a JSON object"),
        (b'"text"', "the body must be a JSON object"),
        (b"null", "the body must be a JSON object"),
        (b'{"temperature": NaN, "messages": []}', "temperature is NaN"),
        (b'{"temperature": 1e999, "messages": []}', "temperature is Infinity"),
    ],
)
async def test_bodies_that_are_no_request(client: httpx.AsyncClient, raw: bytes, message: str) -> None:
    assert message in error_of(await client.post(CHAT, content=raw, headers=JSON))["message"]


async def test_a_body_of_another_type_is_told_which_to_use(client: httpx.AsyncClient) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded"):
        response = await client.post(CHAT, content=b"{}", headers={"content-type": kind})
        assert "sent as application/json" in error_of(response)["message"]


async def test_a_name_of_any_length_is_cut(client: httpx.AsyncClient) -> None:
    error = error_of(await client.post(CHAT, json={"messages": MESSAGES, "x" * 100_000: 1}))
    assert len(error["param"]) == 128
    assert len(error["message"]) < 200


async def test_deep_variables_are_the_templates_to_refuse(client: httpx.AsyncClient) -> None:
    deep = (
        '{"messages": [{"role": "user", "content": "x"}], "chat_template_kwargs": {"a": ' + "[" * 900 + "]" * 900 + "}}"
    )
    assert (await client.post(CHAT, content=deep, headers=JSON)).status_code == 200


MANY = 1000


@pytest.mark.parametrize(
    ("schema", "body"),
    [
        (CompletionRequest, {"prompt": [5, *["a"] * MANY]}),
        (CompletionRequest, {"prompt": ["a", *[5] * MANY]}),
        (CompletionRequest, {"prompt": [[5], *["a"] * MANY]}),
        (CompletionRequest, {"prompt": [["a"] * MANY] * MANY}),
        (CompletionRequest, {"prompt": "x", "stop": [5] * MANY}),
        (CompletionRequest, {"prompt": "x", "stop_token_ids": ["a"] * MANY}),
        (ChatCompletionRequest, {"messages": [5] * MANY}),
        (ChatCompletionRequest, {"messages": [{"role": "user", "content": [5] * MANY}]}),
        (ChatCompletionRequest, {"messages": MESSAGES, "metadata": {str(i): 1 for i in range(MANY)}}),
        (ChatCompletionRequest, {"messages": MESSAGES, "logit_bias": {f"a{i}": 1 for i in range(MANY)}}),
        (ChatCompletionRequest, {"messages": MESSAGES, **{f"a{i}": 1 for i in range(MANY)}}),
        (ChatCompletionRequest, {"messages": [{**MESSAGES[0], **{f"a{i}": 1 for i in range(MANY)}}]}),
        (ChatCompletionRequest, {"messages": MESSAGES, "penstock": {f"a{i}": 1 for i in range(MANY)}}),
        (DetokenizeRequest, {"tokens": ["a"] * MANY}),
    ],
)
def test_a_body_has_few_faults_however_many_are_in_it(schema: type[BaseModel], body: dict[str, Any]) -> None:
    # Each one reported costs microseconds and a kilobyte, and a body has room for millions.
    with pytest.raises(ValidationError) as caught:
        schema.model_validate(body)
    assert caught.value.error_count() <= 3


# ---- limits, at their borders


async def sent(client: httpx.AsyncClient, path: str, **body: Any) -> httpx.Response:
    return await client.post(
        path, json={("messages" if path == CHAT else "prompt"): MESSAGES if path == CHAT else "x", **body}
    )


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize(
    ("name", "allowed", "beyond", "message"),
    [
        ("n", 4, 5, "n is 5; this server makes at most 4"),
        ("stop", ["a", "b"], ["a", "b", "c"], "there are 3 stop strings; this server takes at most 2"),
        ("stop", "x" * 10, "x" * 11, "has 11 characters; this server takes at most 10"),
        ("stop", ["y", "x" * 10], ["y", "x" * 11], "has 11 characters"),
        ("stop_token_ids", [1] * 64, [1] * 65, "at most 64"),
        ("logit_bias", {str(i): 1 for i in range(200)}, {f"{i:03}": 1 for i in range(301)}, "at most 300"),
        ("temperature", 2, 2.0001, "less than or equal to 2"),
        ("presence_penalty", -2, -2.0001, "greater than or equal to -2"),
        ("user", "x" * 512, "x" * 513, "at most 512"),
    ],
)
async def test_limits_of_both_routes(
    client: httpx.AsyncClient, path: str, name: str, allowed: Any, beyond: Any, message: str
) -> None:
    assert (await sent(client, path, **{name: allowed})).status_code == 200
    error = error_of(await sent(client, path, **{name: beyond}))
    assert (error["param"] or "").split(".")[0] == name
    assert message in error["message"]


async def test_logprobs_at_the_limit(client: httpx.AsyncClient) -> None:
    assert (await sent(client, COMPLETIONS, logprobs=5)).status_code == 200
    assert error_of(await sent(client, COMPLETIONS, logprobs=6))["param"] == "logprobs"
    assert (await sent(client, CHAT, logprobs=True, top_logprobs=5)).status_code == 200
    error = error_of(await sent(client, CHAT, logprobs=True, top_logprobs=6))
    assert (error["param"], "at most 5" in error["message"]) == ("top_logprobs", True)


async def test_prompts_at_the_limits(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    assert (await sent(client, COMPLETIONS, prompt=["a"] * 3)).status_code == 200
    assert "prompt has 4 items" in error_of(await sent(client, COMPLETIONS, prompt=["a"] * 4))["message"]
    assert (await sent(client, COMPLETIONS, prompt=[1] * 50)).status_code == 200
    error = error_of(await sent(client, COMPLETIONS, prompt=[[1], [1] * 51]))
    assert (error["code"], error["param"]) == ("context_length_exceeded", "prompt")
    assert "51 tokens and this server takes 50" in error["message"]
    # None of a request's prompts runs if one is refused.
    assert [len(request.prompt_token_ids) for request in engine.requests] == [2, 2, 2, 50]


async def test_a_conversation_at_the_limit(client: httpx.AsyncClient) -> None:
    def of_length(num_chars: int) -> list[dict[str, str]]:
        return [{"role": "user", "content": "x" * num_chars}]

    fixed = (await client.post("/tokenize", json={"messages": of_length(0)})).json()["count"]
    assert (await sent(client, CHAT, messages=of_length(50 - fixed))).status_code == 200
    error = error_of(await sent(client, CHAT, messages=of_length(51 - fixed)))
    assert (error["code"], error["param"]) == ("context_length_exceeded", "messages")


async def test_messages_at_the_limit(engine: FakeEngine) -> None:
    async with http_over(engine) as client:
        for num_messages, message in ((4096, "and this model holds 1000"), (4097, "at most 4096")):
            error = error_of(await sent(client, CHAT, messages=MESSAGES * num_messages))
            assert (error["param"], message in error["message"]) == ("messages", True)


async def test_the_context_is_prompt_and_answer_together(engine: FakeEngine) -> None:
    room = MODEL.max_model_tokens
    async with http_over(engine) as client:
        assert (await sent(client, COMPLETIONS, prompt=[1] * (room - 5), max_tokens=5)).status_code == 200
        error = error_of(await sent(client, COMPLETIONS, prompt=[1] * (room - 5), max_tokens=6))
        assert (error["code"], error["param"]) == ("context_length_exceeded", "max_tokens")
        assert (await sent(client, COMPLETIONS, prompt=[1] * (room - 1))).status_code == 200
        error = error_of(await sent(client, COMPLETIONS, prompt=[1] * room))
        assert (error["code"], error["param"]) == ("context_length_exceeded", "prompt")
        assert (await sent(client, CHAT)).status_code == 200
    whole, default, chat = engine.requests
    assert (whole.sampling.max_tokens, default.sampling.max_tokens) == (5, 1)
    assert chat.sampling.max_tokens == room - len(chat.prompt_token_ids)


@pytest.mark.parametrize("is_chunked", [False, True])
async def test_a_body_at_the_limit(engine: FakeEngine, is_chunked: bool) -> None:
    raw = json.dumps({"prompt": "x"}).encode()

    async def pieces() -> AsyncGenerator[bytes, None]:
        for start in range(0, len(raw), 5):
            yield raw[start : start + 5]

    for limit, status in ((len(raw), 200), (len(raw) - 1, 413)):
        async with http_over(engine, ServerConfig(max_body_bytes=limit)) as client:
            response = await client.post(COMPLETIONS, content=pieces() if is_chunked else raw, headers=JSON)
        assert response.status_code == status
        if status == 413:
            error = error_of(response, 413)
            assert error["code"] == "request_too_large"
            assert f"larger than the {limit} bytes" in error["message"]
