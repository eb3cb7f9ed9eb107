"""/v1/messages through Anthropic's own client: on a model that says random things, or over a fake engine."""

import json
from collections.abc import AsyncGenerator, Callable, Iterator
from typing import Any, Literal

import anthropic
import httpx
import openai
import pytest
from anthropic.types import Message, RawMessageStreamEvent
from pydantic import BaseModel, Field

from penstock.errors import InternalError, Overloaded, StepFailed
from penstock.protocol import GenerateRequest, TokenDelta
from tests.server.fakes import HERMES, THINKING, FakeEngine, anthropic_over, delta, http_over, saying
from tests.servers import RunningServer

HELLO: Any = [{"role": "user", "content": "hello"}]
WEATHER: Any = {
    "name": "get_weather",
    "description": "Weather of a city",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 8}},
        "required": ["city"],
        "additionalProperties": False,
    },
}
CLOCK: Any = {"name": "clock", "input_schema": {"type": "object", "properties": {}, "additionalProperties": False}}
SAID = (
    *("<thi", "nk>\nI wo", "nder.", "\n</th", "ink>\n\nLet me", " see.\n<tool", "_call>\n{"),
    *('"name": "get_we', 'ather", "argum', 'ents": {"city": "O', "slo", '"}', "}\n</tool_call>"),
    '\n<tool_call>{"name": "clock"}</tool_call>',
)


class Dish(BaseModel):
    """What a random model will order."""

    name: str = Field(max_length=12)
    course: Literal["starter", "main"]


@pytest.fixture(scope="module")
def claude(server: RunningServer) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as client:
        yield client


def plain(message: Message) -> dict[str, Any]:
    """Return what two answers to the same request have in common."""
    whole = message.model_dump(exclude={"id", "usage"}, exclude_none=True)
    for block in whole["content"]:
        block.pop("id", None)
        block.pop("parsed_output", None)
    return whole


def told(events: list[RawMessageStreamEvent]) -> None:
    """Check that events tell a message from its beginning to its end, each block by itself."""
    kinds = [event.type for event in events]
    assert kinds[0] == "message_start"
    assert kinds[-2:] == ["message_delta", "message_stop"]
    index, is_open = -1, False
    for event in events:
        if event.type == "content_block_start":
            assert (event.index, is_open) == (index + 1, False)
            index, is_open = event.index, True
        elif event.type == "content_block_delta":
            assert (event.index, is_open) == (index, True)
        elif event.type == "content_block_stop":
            assert (event.index, is_open) == (index, True)
            is_open = False


async def ask(client: anthropic.AsyncAnthropic, **request: Any) -> Message:
    """Return the answer, the same whole, as events and through the SDK's own reading of them."""
    given: dict[str, Any] = {"model": "fake", "max_tokens": 100, "messages": HELLO, **request}
    whole: Message = await client.messages.create(**given)
    Message.model_validate(whole.model_dump(exclude_unset=True), strict=True)
    told([event async for event in await client.messages.create(**given, stream=True)])
    async with client.messages.stream(**given) as stream:
        final = await stream.get_final_message()
    assert plain(final) == plain(whole)
    assert final.usage == whole.usage
    return whole


def test_text(claude: anthropic.Anthropic, client: openai.OpenAI) -> None:
    request: dict[str, Any] = {"model": "tiny", "messages": HELLO, "max_tokens": 12, "extra_body": {"temperature": 0}}
    answer = claude.messages.create(**request, system="Be brief.")
    chat = client.chat.completions.create(
        model="tiny", messages=[{"role": "system", "content": "Be brief."}, *HELLO], temperature=0, max_tokens=12
    )
    (block,) = answer.content
    assert block.type == "text"
    assert block.text == chat.choices[0].message.content
    assert (answer.stop_reason, answer.role, answer.type, answer.model) == (
        "max_tokens",
        "assistant",
        "message",
        "tiny",
    )
    assert chat.usage is not None
    again = claude.messages.create(
        **request, system=[{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]
    )
    assert again.content == answer.content
    for usage in (answer.usage, again.usage):
        assert usage.cache_read_input_tokens is not None
        assert usage.input_tokens + usage.cache_read_input_tokens == chat.usage.prompt_tokens
        assert usage.output_tokens == 12
    assert again.usage.cache_read_input_tokens
    assert answer._request_id
    with claude.messages.stream(**request, system="Be brief.") as stream:
        assert "".join(stream.text_stream) == block.text
    counted = claude.messages.count_tokens(model="tiny", messages=HELLO, system="Be brief.")
    assert counted.input_tokens == chat.usage.prompt_tokens


def test_sampling_and_stop_sequences(claude: anthropic.Anthropic, client: openai.OpenAI) -> None:
    request: dict[str, Any] = {"model": "tiny", "messages": HELLO, "max_tokens": 40}
    extra = {"temperature": 1, "top_k": 20, "top_p": 0.9, "seed": 4}
    (block,) = claude.messages.create(**request, extra_body=extra).content
    assert block.type == "text"
    chat = client.chat.completions.create(**request, extra_body=extra)
    assert block.text == chat.choices[0].message.content
    stop = block.text[10:12]
    cut = claude.messages.create(**request, extra_body=extra, stop_sequences=["never", stop])
    (before,) = cut.content
    assert before.type == "text"
    assert before.text == block.text[: block.text.index(stop)]
    assert (cut.stop_reason, cut.stop_sequence) == ("stop_sequence", stop)


def test_a_schema(claude: anthropic.Anthropic) -> None:
    parsed = claude.messages.parse(
        model="tiny", messages=HELLO, max_tokens=300, output_format=Dish, extra_body={"seed": 3}
    )
    assert isinstance(parsed.parsed_output, Dish)
    assert parsed.stop_reason == "end_turn"


def test_the_assistants_beginning_is_gone_on_with(claude: anthropic.Anthropic, client: openai.OpenAI) -> None:
    request: dict[str, Any] = {
        "model": "tiny",
        "messages": [*HELLO, {"role": "assistant", "content": "The answer is"}],
        "max_tokens": 5,
    }
    (block,) = claude.messages.create(**request, extra_body={"temperature": 0}).content
    chat = client.chat.completions.create(
        **request, temperature=0, extra_body={"continue_final_message": True, "add_generation_prompt": False}
    )
    assert block.type == "text"
    assert block.text == chat.choices[0].message.content


@pytest.mark.parametrize("name", ["hermes", "llama3_json", "mistral"])
@pytest.mark.parametrize("choice", [{"type": "tool", "name": "get_weather"}, {"type": "any"}])
def test_forced_calls(templated: Callable[[str], RunningServer], name: str, choice: Any) -> None:
    request: dict[str, Any] = {
        "model": "tiny",
        "messages": HELLO,
        "max_tokens": 400,
        "tools": [CLOCK, WEATHER],
        "tool_choice": {**choice, "disable_parallel_tool_use": True},
        "extra_body": {"seed": 1},
    }
    with anthropic.Anthropic(base_url=templated(name).url, api_key="none", max_retries=0) as client:
        answer = client.messages.create(**request)
        with client.messages.stream(**request) as stream:
            streamed = stream.get_final_message()
    (block,) = answer.content
    assert block.type == "tool_use"
    assert answer.stop_reason == "tool_use"
    if block.name == "get_weather":
        assert list(block.input) == ["city"]
    else:
        assert (block.name, block.input) == ("clock", {})
    assert plain(streamed) == plain(answer)


@pytest.mark.parametrize("pieces", [SAID, ("".join(SAID),), tuple("".join(SAID))], ids=["pieces", "whole", "letters"])
async def test_thinking_text_and_calls_are_blocks(pieces: tuple[str, ...]) -> None:
    async with anthropic_over(saying(*pieces), template=THINKING) as client:
        answer = await ask(client, tools=[CLOCK, WEATHER])
    thinking, text, weather, clock = answer.content
    assert (thinking.type, text.type, weather.type, clock.type) == ("thinking", "text", "tool_use", "tool_use")
    assert isinstance(thinking, anthropic.types.ThinkingBlock)
    assert isinstance(text, anthropic.types.TextBlock)
    assert isinstance(weather, anthropic.types.ToolUseBlock)
    assert isinstance(clock, anthropic.types.ToolUseBlock)
    assert (thinking.thinking, text.text) == ("I wonder.", "Let me see.")
    assert (weather.name, weather.input, clock.name, clock.input) == ("get_weather", {"city": "Oslo"}, "clock", {})
    assert answer.stop_reason == "tool_use"


async def test_what_an_answer_had_goes_back_as_the_chat_would_have_it() -> None:
    engine = saying(*SAID)
    chat_tools = [
        {
            "type": "function",
            "function": {"name": t["name"], "parameters": t["input_schema"]}
            | ({"description": t["description"]} if "description" in t else {}),
        }
        for t in (CLOCK, WEATHER)
    ]
    async with anthropic_over(engine, template=THINKING) as client:
        answer = await client.messages.create(model="fake", max_tokens=9, messages=HELLO, tools=[CLOCK, WEATHER])
        _, _, weather, clock = answer.content
        assert weather.type == clock.type == "tool_use"
        await client.messages.create(
            model="fake",
            max_tokens=9,
            system="Be brief.",
            tools=[CLOCK, WEATHER],
            messages=[
                *HELLO,
                answer.to_param(),
                {
                    "role": "user",
                    "content": [
                        {"type": "text", "text": "And "},
                        {"type": "tool_result", "tool_use_id": weather.id, "content": "rain"},
                        {
                            "type": "tool_result",
                            "tool_use_id": clock.id,
                            "content": [{"type": "text", "text": "broken"}],
                            "is_error": True,
                        },
                        {"type": "text", "text": "now?", "cache_control": {"type": "ephemeral"}},
                    ],
                },
            ],
        )
    calls = [
        {"id": one.id, "type": "function", "function": {"name": one.name, "arguments": json.dumps(one.input)}}
        for one in (weather, clock)
    ]
    messages = [
        {"role": "system", "content": "Be brief."},
        *HELLO,
        {"role": "assistant", "reasoning_content": "I wonder.", "content": "Let me see.", "tool_calls": calls},
        {"role": "tool", "tool_call_id": weather.id, "content": "rain"},
        {"role": "tool", "tool_call_id": clock.id, "content": "broken"},
        {"role": "user", "content": "And now?"},
    ]
    async with http_over(engine, template=THINKING) as http:
        await http.post("/v1/chat/completions", json={"messages": messages, "tools": chat_tools})
    _, message, chat = engine.requests
    assert message.prompt_token_ids == chat.prompt_token_ids


async def test_thinking_may_be_told_to_the_template() -> None:
    async with anthropic_over(saying("why", "</think>", "yes"), template=THINKING) as client:
        on = await ask(client, thinking={"type": "enabled", "budget_tokens": 1024})
        off = await ask(client, thinking={"type": "disabled"})
    assert [block.type for block in on.content] == ["thinking", "text"]
    assert [block.type for block in off.content] == ["text"]


async def test_an_answer_that_was_cut_or_says_nothing() -> None:
    engine = saying('<tool_call>{"name": "get_weather", "arguments": {"city": "Os', reason="length")
    async with anthropic_over(engine, template=HERMES) as client:
        answer = await ask(client, tools=[WEATHER])
    (block,) = answer.content
    assert isinstance(block, anthropic.types.ToolUseBlock)
    assert (answer.stop_reason, block.name) == ("max_tokens", "get_weather")
    assert block.input in ({}, {"city": "Os"})
    async with anthropic_over(saying(""), template=HERMES) as client:
        empty = await ask(client)
    (text,) = empty.content
    assert isinstance(text, anthropic.types.TextBlock)
    assert (text.text, empty.stop_reason) == ("", "end_turn")


async def test_errors_are_the_sdks_own() -> None:
    async def broken(request: GenerateRequest) -> AsyncGenerator[TokenDelta, None]:
        yield delta(request, "half")
        raise StepFailed("the step failed")

    async def full(request: GenerateRequest) -> AsyncGenerator[TokenDelta, None]:
        raise Overloaded("the queue is full", retry_after_s=3)
        yield delta(request, "")

    async def faulty(request: GenerateRequest) -> AsyncGenerator[TokenDelta, None]:
        raise InternalError("ours to mend")
        yield delta(request, "")

    request: dict[str, Any] = {"model": "fake", "max_tokens": 5, "messages": HELLO}
    async with anthropic_over(FakeEngine(broken)) as client:
        with pytest.raises(anthropic.APIStatusError, match="the step failed"):
            async with client.messages.stream(**request) as stream:
                await stream.get_final_message()
        with pytest.raises(anthropic.NotFoundError) as missing:
            await client.messages.create(**{**request, "model": "claude-none"})
        assert missing.value.body == {
            "type": "error",
            "error": {
                "type": "not_found_error",
                "message": "there is no model 'claude-none' here; this server has fake",
            },
        }
        with pytest.raises(anthropic.NotFoundError, match="nothing at"):
            await client.messages.batches.list()
    for script, kind, status in ((full, "overloaded_error", 503), (faulty, "api_error", 500)):
        async with anthropic_over(FakeEngine(script)) as client:
            for is_streamed in (False, True):
                with pytest.raises(anthropic.InternalServerError) as caught:
                    await client.messages.create(**request, stream=is_streamed)
                assert caught.value.status_code == status
                assert caught.value.body["error"]["type"] == kind  # type: ignore[index]


def test_bodies_that_are_too_large(claude: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.APIStatusError) as caught:
        claude.messages.create(model="tiny", max_tokens=5, messages=[{"role": "user", "content": "x" * 300_000}])
    assert (caught.value.status_code, caught.value.body["error"]["type"]) == (413, "request_too_large")  # type: ignore[index]


IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}}
RESULT = {"type": "tool_result", "tool_use_id": "1"}
TOOL = {"name": "f", "input_schema": {"properties": {"a": {"type": "wrong"}}}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_tokens": None}, "max_tokens is null"),
        ({"max_tokens": 100_000}, "lower max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "cook", "content": "x"}]}, "messages.0.role"),
        (
            {"messages": [{"role": "user", "content": [IMAGE]}]},
            "messages.0.content.0.source: this model sees no images",
        ),
        (
            {"messages": [{"role": "user", "content": [{**RESULT, "content": [IMAGE]}]}]},
            "messages.0.content.0.content.0.source: this model sees no images",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "tool_use", "id": "1", "name": "f", "input": {}}]}]},
            "messages.0: a tool_use block is never of user",
        ),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools.0"),
        ({"tool_choice": {"type": "tool"}}, "tool_choice: a name belongs to type tool"),
        ({"tool_choice": {"type": "any"}}, "tool_choice needs tools"),
        ({"container": "c"}, "runs no tools"),
        ({"service_tier": "priority"}, "one tier"),
        ({"stop_sequences": [""]}, "stop string is empty"),
        (
            {"output_config": {"format": {"type": "json_schema", "schema": TOOL["input_schema"]}}},
            "output_config.format.schema.properties.a cannot be compiled",
        ),
        ({"nonsense": 1}, "unknown parameter 'nonsense'"),
    ],
)
def test_what_is_wrong_is_said(server: RunningServer, change: dict[str, Any], message: str) -> None:
    body = {"model": "tiny", "max_tokens": 5, "messages": HELLO, **change}
    answer = httpx.post(f"{server.url}/v1/messages", json=body)
    assert answer.status_code == 400, answer.text
    error = answer.json()
    assert (error["type"], error["error"]["type"]) == ("error", "invalid_request_error")
    assert message in error["error"]["message"]


def test_a_tools_schema_is_named_where_it_stands(templated: Callable[[str], RunningServer]) -> None:
    body = {"max_tokens": 5, "messages": HELLO, "tools": [TOOL], "tool_choice": {"type": "any"}}
    error = httpx.post(f"{templated('hermes').url}/v1/messages", json=body).json()["error"]
    assert "tools.0.input_schema.properties.a cannot be compiled" in error["message"]


def test_headers_and_names_that_clients_send_are_tolerated(server: RunningServer) -> None:
    headers = {"x-api-key": "anything", "anthropic-version": "2023-06-01", "anthropic-beta": "some-2025-01-01"}
    body = {
        "model": "tiny",
        "max_tokens": 1,
        "messages": HELLO,
        "metadata": {"user_id": "u"},
        "service_tier": "auto",
        "cache_control": {"type": "ephemeral"},
        "system": [{"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}}],
    }
    answer = httpx.post(f"{server.url}/v1/messages?beta=true", json=body, headers=headers)
    assert answer.status_code == 200, answer.text
    assert answer.headers["request-id"] == answer.headers["x-request-id"]
