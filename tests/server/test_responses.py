"""/v1/responses through OpenAI's own client: on a model that says random things, or over a fake engine."""

import inspect
import json
from collections.abc import AsyncGenerator, Callable
from itertools import pairwise
from typing import Any, Literal

import httpx
import openai
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel, Field, TypeAdapter

from penstock.errors import StepFailed
from penstock.protocol import GenerateRequest, TokenDelta
from penstock.server.responses.schemas import ResponsesRequest
from tests.server.fakes import HERMES, THINKING, FakeEngine, delta, openai_over, saying
from tests.servers import RunningServer

WEATHER: Any = {
    "type": "function",
    "name": "get_weather",
    "description": "Weather of a city",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 8}},
        "required": ["city"],
        "additionalProperties": False,
    },
    "strict": True,
}
CLOCK: Any = {"type": "function", "name": "clock", "parameters": None, "strict": None}
SAID = (
    *("<thi", "nk>\nI wo", "nder.", "\n</th", "ink>\n\nLet me", " see.\n<tool", "_call>\n{"),
    *('"name": "get_we', 'ather", "argum', 'ents": {"city": "O', "slo", '"}', "}\n</tool_call>"),
    '\n<tool_call>{"name": "clock"}</tool_call>',
)


class Dish(BaseModel):
    """What a random model will order."""

    name: str = Field(max_length=12)
    course: Literal["starter", "main"]


def checked(answer: Response) -> Response:
    """Check an answer against the SDK's own types, which it does not do by itself; return it."""
    return Response.model_validate(answer.model_dump(exclude_unset=True, by_alias=True))


def plain(answer: Response) -> dict[str, Any]:
    """Return what two answers to the same request have in common."""
    whole = answer.model_dump(exclude={"id", "created_at", "completed_at"})
    for item in whole["output"]:
        del item["id"]
        item.pop("call_id", None)
    return whole


def told(events: list[ResponseStreamEvent]) -> Response:
    """Check that events tell a response from its beginning to its end, and return it."""
    adapter: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.type for event in events[:2]] == ["response.created", "response.in_progress"]
    texts: dict[tuple[str, str], str] = {}
    added: list[Any] = []
    done: list[Any] = []
    for event in events:
        adapter.validate_python(event.model_dump(by_alias=True))
        match event.type:
            case "response.output_item.added":
                assert event.output_index == len(added) == len(done)
                assert event.item.status == "in_progress"  # type: ignore[union-attr]
                added.append(event.item)
            case "response.output_text.delta" | "response.reasoning_text.delta":
                key = (event.item_id, event.type.removesuffix(".delta"))
                texts[key] = texts.get(key, "") + event.delta
            case "response.function_call_arguments.delta":
                key = (event.item_id, "arguments")
                texts[key] = texts.get(key, "") + event.delta
            case "response.output_text.done" | "response.reasoning_text.done":
                assert texts.get((event.item_id, event.type.removesuffix(".done")), "") == event.text
            case "response.function_call_arguments.done":
                assert texts.get((event.item_id, "arguments"), "") == event.arguments
            case "response.output_item.done":
                assert event.item.id == added[-1].id
                done.append(event.item)
    assert len(added) == len(done)
    (*_, last) = events
    assert last.type in ("response.completed", "response.incomplete")
    assert [item.id for item in last.response.output] == [item.id for item in done]
    assert [item.model_dump() for item in last.response.output] == [item.model_dump() for item in done]
    return last.response


async def ask(client: openai.AsyncOpenAI, **request: Any) -> tuple[Response, list[ResponseStreamEvent]]:
    """Return the answer and the events that tell the same."""
    whole = await client.responses.create(model="fake", **request)
    events = [event async for event in await client.responses.create(model="fake", stream=True, **request)]
    assert plain(told(events)) == plain(checked(whole))
    return whole, events


def test_text(client: openai.OpenAI) -> None:
    request: dict[str, Any] = {"model": "tiny", "input": "hello", "temperature": 0, "max_output_tokens": 12}
    answer = checked(client.responses.create(**request))
    chat = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "hello"}], temperature=0, max_tokens=12
    )
    assert answer.output_text == chat.choices[0].message.content
    assert (answer.status, answer.object, answer.model) == ("incomplete", "response", "tiny")
    assert answer.incomplete_details is not None
    assert answer.incomplete_details.reason == "max_output_tokens"
    assert answer.usage is not None
    assert chat.usage is not None
    assert answer.usage.input_tokens == chat.usage.prompt_tokens
    assert (answer.usage.output_tokens, answer.usage.total_tokens) == (12, chat.usage.total_tokens)
    streamed = told(list(client.responses.create(**request, stream=True)))
    assert streamed.output_text == answer.output_text
    assert streamed.usage is not None
    assert streamed.usage.input_tokens_details.cached_tokens > 0
    system = client.responses.create(**request, instructions="Be brief.")
    assert system.usage is not None
    assert system.usage.input_tokens > answer.usage.input_tokens
    assert system.instructions == "Be brief."


def test_the_sdks_parse_and_stream_helpers(client: openai.OpenAI) -> None:
    request: dict[str, Any] = {"model": "tiny", "input": "hello", "extra_body": {"seed": 3}}
    parsed = client.responses.parse(**request, text_format=Dish)
    assert isinstance(parsed.output_parsed, Dish)
    assert parsed.status == "completed"
    with client.responses.stream(**request, text_format=Dish) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert kinds[0] == "response.created"
    assert kinds[-1] == "response.completed"
    assert final.output_parsed == parsed.output_parsed


def test_any_json_object(client: openai.OpenAI) -> None:
    bias = {str(ord('"') - 33): 6, str(ord("}") - 33): 8}
    answer = client.responses.create(
        model="tiny", input="x", text={"format": {"type": "json_object"}}, extra_body={"seed": 2, "logit_bias": bias}
    )
    assert isinstance(json.loads(answer.output_text), dict)
    assert answer.text is not None
    assert answer.text.format is not None
    assert answer.text.format.type == "json_object"


@pytest.mark.parametrize("name", ["hermes", "llama3_json", "mistral"])
def test_a_named_tool_is_called_with_right_arguments(servers: Callable[[str], openai.OpenAI], name: str) -> None:
    request: dict[str, Any] = {
        "model": "tiny",
        "input": "hello",
        "tools": [CLOCK, WEATHER],
        "tool_choice": {"type": "function", "name": "get_weather"},
        "extra_body": {"seed": 1},
    }
    answer = checked(servers(name).responses.create(**request))
    (call,) = answer.output
    assert call.type == "function_call"
    assert (call.name, list(json.loads(call.arguments))) == ("get_weather", ["city"])
    assert answer.status == "completed"
    streamed = told(list(servers(name).responses.create(**request, stream=True)))
    assert plain(streamed)["output"] == plain(answer)["output"]


def test_logprobs_are_of_the_text(client: openai.OpenAI) -> None:
    request: dict[str, Any] = {
        "model": "tiny",
        "input": "x",
        "temperature": 0,
        "max_output_tokens": 5,
        "include": ["message.output_text.logprobs"],
        "top_logprobs": 2,
    }
    answer = checked(client.responses.create(**request))
    (message,) = answer.output
    assert message.type == "message"
    (part,) = message.content
    assert part.type == "output_text"
    assert part.logprobs is not None
    assert b"".join(bytes(one.bytes) for one in part.logprobs).decode(errors="replace") == part.text
    assert all(len(one.top_logprobs) == 2 for one in part.logprobs)
    assert told(list(client.responses.create(**request, stream=True))).output_text == answer.output_text


@pytest.mark.parametrize("pieces", [SAID, ("".join(SAID),), tuple("".join(SAID))], ids=["pieces", "whole", "letters"])
async def test_reasoning_text_and_calls_are_items(pieces: tuple[str, ...]) -> None:
    async with openai_over(saying(*pieces), template=THINKING) as client:
        answer, events = await ask(client, input="hi", tools=[CLOCK, WEATHER])
    reasoning, message, weather, clock = answer.output
    assert reasoning.type == "reasoning"
    assert [part.text for part in reasoning.content or ()] == ["I wonder."]
    assert message.type == "message"
    assert answer.output_text == "Let me see."
    assert weather.type == clock.type == "function_call"
    assert (weather.name, weather.arguments) == ("get_weather", '{"city": "Oslo"}')
    assert (clock.name, clock.arguments) == ("clock", "{}")
    assert weather.call_id != clock.call_id
    assert answer.usage is not None
    assert answer.usage.output_tokens_details.reasoning_tokens > 0
    order = [event.type.removeprefix("response.") for event in events]
    kinds = [kind for kind, after in pairwise(["", *order]) if kind != after]
    assert kinds[3:9] == [
        "output_item.added",
        "content_part.added",
        "reasoning_text.delta",
        "reasoning_text.done",
        "content_part.done",
        "output_item.done",
    ]
    assert kinds[-4:] == [
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
    ]


async def test_what_an_answer_had_goes_back_as_the_chat_would_have_it() -> None:
    engine = saying(*SAID)
    async with openai_over(engine, template=THINKING) as client:
        answer = await client.responses.create(model="fake", input="hi", tools=[CLOCK, WEATHER])
        _, _, weather, clock = answer.output
        assert weather.type == clock.type == "function_call"
        await client.responses.create(
            model="fake",
            instructions="Be brief.",
            tools=[CLOCK, WEATHER],
            input=[
                {"role": "user", "content": [{"type": "input_text", "text": "h"}, {"type": "input_text", "text": "i"}]},
                *(item.model_dump(exclude_none=True) for item in answer.output),  # type: ignore[list-item]
                {"type": "function_call_output", "call_id": weather.call_id, "output": "rain"},
                {
                    "type": "function_call_output",
                    "call_id": clock.call_id,
                    "output": [{"type": "input_text", "text": "noon"}],
                },
                {"type": "message", "role": "developer", "content": "Now."},
            ],
        )
        tools: list[Any] = [
            {"type": "function", "function": {k: v for k, v in tool.items() if k != "type" and v is not None}}
            for tool in (CLOCK, WEATHER)
        ]
        calls = [
            {"id": one.call_id, "type": "function", "function": {"name": one.name, "arguments": one.arguments}}
            for one in (weather, clock)
        ]
        await client.chat.completions.create(
            model="fake",
            tools=tools,
            messages=[
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "hi"},
                {"role": "assistant", "reasoning_content": "I wonder.", "content": "Let me see.", "tool_calls": calls},  # type: ignore[list-item]
                {"role": "tool", "tool_call_id": weather.call_id, "content": "rain"},
                {"role": "tool", "tool_call_id": clock.call_id, "content": "noon"},
                {"role": "system", "content": "Now."},
            ],
        )
    _, response, chat = engine.requests
    assert response.prompt_token_ids == chat.prompt_token_ids


async def test_an_answer_without_words_is_an_empty_message() -> None:
    async with openai_over(saying("<think>", "so", "</think>"), template=THINKING) as client:
        answer, _ = await ask(client, input="hi")
        assert [item.type for item in answer.output] == ["reasoning", "message"]
        assert answer.output_text == ""
    async with openai_over(saying("<think>", "so", reason="length"), template=THINKING) as client:
        answer, _ = await ask(client, input="hi")
        assert [item.type for item in answer.output] == ["reasoning"]
        assert answer.output[0].status == "incomplete"  # type: ignore[union-attr]


async def test_a_call_that_was_cut_is_incomplete() -> None:
    engine = saying('<tool_call>{"name": "get_weather", "arguments": {"ci', reason="length")
    async with openai_over(engine, template=HERMES) as client:
        answer, _ = await ask(client, input="hi", tools=[WEATHER])
    (call,) = answer.output
    assert call.type == "function_call"
    assert (answer.status, call.status, call.arguments) == ("incomplete", "incomplete", '{"ci')


async def test_a_failure_in_mid_stream_is_told() -> None:
    async def script(request: GenerateRequest) -> AsyncGenerator[TokenDelta, None]:
        yield delta(request, "half")
        raise StepFailed("the step failed")

    async with openai_over(FakeEngine(script)) as client:
        events = [event async for event in await client.responses.create(model="fake", input="hi", stream=True)]
        with pytest.raises(openai.InternalServerError):
            await client.responses.create(model="fake", input="hi")
    error, last = next(event for event in events if event.type == "error"), events[-1]
    assert (error.code, error.message) == ("step_failed", "the step failed")
    assert last.type == "response.failed"
    assert (last.response.status, last.response.output_text) == ("failed", "half")
    assert last.response.error is not None
    assert last.response.error.code == "server_error"
    assert [event.sequence_number for event in events] == list(range(len(events)))


async def test_effort_is_the_templates_to_read() -> None:
    engine = saying("why", "</think>", "yes")
    async with openai_over(engine, template=THINKING) as client:
        thinking = await client.responses.create(model="fake", input="x", reasoning={"effort": "low"})
        silent = await client.responses.create(model="fake", input="x", reasoning={"effort": "none"})
    assert [item.type for item in thinking.output] == ["reasoning", "message"]
    assert [item.type for item in silent.output] == ["message"]
    assert thinking.reasoning is not None
    assert thinking.reasoning.effort == "low"


# ---- what is refused

SDK_ONLY = {"self", "extra_headers", "extra_query", "extra_body", "timeout"}


@pytest.mark.parametrize(
    "name", sorted(inspect.signature(openai.OpenAI(api_key="x").responses.create).parameters.keys() - SDK_ONLY)
)
def test_every_parameter_of_the_sdk_is_taken_or_refused_by_name(server: RunningServer, name: str) -> None:
    if name in ResponsesRequest.model_fields:
        return
    answer = httpx.post(f"{server.url}/v1/responses", json={"input": "x", "max_output_tokens": 1, name: {"a": 1}})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, name)


WRONG = {"properties": {"a": {"type": "wrong"}}}


@pytest.mark.parametrize(
    ("change", "param", "message"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id", "keeps no responses; send the whole"),
        ({"conversation": {"id": "c"}}, "conversation", "keeps no responses; send the whole"),
        ({"background": True}, "background", "keeps no responses to come back for"),
        ({"store": True}, "store", "keeps no responses"),
        ({"prompt": {"id": "p"}}, "prompt", "keeps no prompts"),
        ({"truncation": "auto"}, "truncation", "truncate_prompt_tokens"),
        ({"input": []}, "input", "at least 1"),
        ({"input": 5}, "input", "is 5"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input.0", "message, function_call"),
        ({"input": [{"role": "user"}]}, "input.0.content", "is missing"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
            "input.0.content.0.image_url",
            "sees no images",
        ),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type", "web_search"),
        ({"tool_choice": "required"}, "tool_choice", "needs tools"),
        ({"top_logprobs": 2}, "top_logprobs", "include"),
        ({"max_output_tokens": 100_000}, "max_output_tokens", "lower max_output_tokens"),
        ({"input": "x" * 3000}, "input", "shorten it"),
        (
            {
                "text": {
                    "format": {"type": "json_schema", "name": "n", "schema": {"properties": {"a": {"type": "wrong"}}}}
                }
            },
            "text.format.schema.properties.a",
            "text.format.schema.properties.a cannot be compiled",
        ),
        (
            {"input": [{"type": "function_call", "call_id": "1", "name": "f", "arguments": "[]"}]},
            "input",
            "not a JSON object",
        ),
        ({"n": 2}, "n", "unknown parameter"),
        ({"penstock": {"priority": "P9"}}, "penstock.priority", "P9"),
    ],
)
def test_what_is_wrong_is_said_where_it_stands(
    client: openai.OpenAI, change: dict[str, Any], param: str, message: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(model="tiny", extra_body={"input": "x", **change})
    assert caught.value.param == param
    assert message in caught.value.message


def test_what_asks_for_nothing_is_taken(client: openai.OpenAI) -> None:
    answer = client.responses.create(
        model="tiny",
        input="x",
        max_output_tokens=1,
        store=False,
        background=False,
        truncation="disabled",
        service_tier="auto",
        previous_response_id=None,
        metadata={"a": "b"},
        user="u",
        safety_identifier="s",
        prompt_cache_key="k",
        parallel_tool_calls=True,
        include=["reasoning.encrypted_content"],
    )
    assert (answer.metadata, answer.user, answer.store) == ({"a": "b"}, "u", False)  # type: ignore[attr-defined]
