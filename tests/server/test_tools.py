"""Tools and reasoning through OpenAI's own client: forced by grammar on a random model, or said by a fake engine."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai.types.chat import ChatCompletion

from penstock.server import ServerConfig
from penstock.text.tool_formats import FORMATS
from tests.server.fakes import HERMES, THINKING, openai_over, saying
from tests.servers import serve_checkpoint
from tests.tiny_models import make_talker

WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 8}, "unit": {"$ref": "#/$defs/unit"}},
            "required": ["city", "unit"],
            "additionalProperties": False,
            "$defs": {"unit": {"enum": ["C", "F"]}},
        },
    },
}
CLOCK: Any = {"type": "function", "function": {"name": "clock"}}
THINK = {"chat_template_kwargs": {"enable_thinking": True}}
HELLO: list[Any] = [{"role": "user", "content": "hello"}]


def check_weather(arguments: str) -> None:
    value = json.loads(arguments)
    assert list(value) == ["city", "unit"]
    assert len(value["city"]) <= 8
    assert value["unit"] in ("C", "F")


REQUEST: dict[str, Any] = {"model": "tiny", "messages": HELLO, "max_tokens": 400, "temperature": 1, "seed": 1}
NAMED: Any = {"type": "function", "function": {"name": "get_weather"}}


@pytest.mark.parametrize("name", FORMATS)
def test_a_named_tool_is_called_once_with_right_arguments(servers: Callable[[str], openai.OpenAI], name: str) -> None:
    answer = servers(name).chat.completions.create(**REQUEST, tools=[CLOCK, WEATHER], tool_choice=NAMED, n=3)
    ids = set()
    for choice in answer.choices:
        assert choice.finish_reason == "tool_calls"
        assert choice.message.content is None
        (call,) = choice.message.tool_calls or []
        assert call.type == "function"
        assert call.function.name == "get_weather"
        check_weather(call.function.arguments)
        ids.add(call.id)
    assert len(ids) == 3
    ChatCompletion.model_validate(answer.model_dump(exclude_unset=True), strict=True)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("is_parallel", [True, False])
def test_required_calls_streamed_as_whole(
    servers: Callable[[str], openai.OpenAI], name: str, is_parallel: bool
) -> None:
    client = servers(name)
    request = {
        **REQUEST,
        "tools": [CLOCK, WEATHER],
        "tool_choice": "required",
        "parallel_tool_calls": is_parallel,
        "seed": 4,
    }
    whole = client.chat.completions.create(**request).choices[0]
    calls: dict[int, dict[str, Any]] = {}
    reasons, content = [], ""
    for chunk in client.chat.completions.create(**request, stream=True):
        for choice in chunk.choices:
            content += choice.delta.content or ""
            reasons.append(choice.finish_reason)
            for call in choice.delta.tool_calls or []:
                if call.index not in calls:
                    assert call.index == len(calls)
                    assert call.id
                    assert call.function is not None
                    assert call.function.name
                    calls[call.index] = {"name": call.function.name, "arguments": ""}
                else:
                    assert call.id is None
                    assert call.function is not None
                    assert call.function.name is None
                calls[call.index]["arguments"] += call.function.arguments or ""
    assert content == ""
    assert [reason for reason in reasons if reason] == ["tool_calls"]
    assert list(calls.values()) == [
        {"name": call.function.name, "arguments": call.function.arguments}
        for call in whole.message.tool_calls or []
        if call.type == "function"
    ]
    assert calls
    if not is_parallel:
        assert len(calls) == 1
    for one in calls.values():
        if one["name"] == "clock":
            assert json.loads(one["arguments"]) == {}
        else:
            check_weather(one["arguments"])


def test_arguments_come_piece_by_piece(servers: Callable[[str], openai.OpenAI]) -> None:
    stream = servers("hermes").chat.completions.create(**REQUEST, tools=[WEATHER], tool_choice="required", stream=True)
    pieces = [call for chunk in stream for choice in chunk.choices for call in choice.delta.tool_calls or []]
    assert len(pieces) > 5


def test_a_call_that_was_cut_says_so(servers: Callable[[str], openai.OpenAI]) -> None:
    request = {**REQUEST, "tools": [WEATHER], "tool_choice": NAMED}
    choice = servers("hermes").chat.completions.create(**{**request, "max_tokens": 60}).choices[0]
    assert choice.finish_reason == "length"
    (call,) = choice.message.tool_calls or []
    assert call.type == "function"
    assert call.function.name == "get_weather"


def test_auto_may_answer_in_words(servers: Callable[[str], openai.OpenAI]) -> None:
    choice = servers("hermes").chat.completions.create(**{**REQUEST, "max_tokens": 20}, tools=[WEATHER]).choices[0]
    assert choice.finish_reason == "length"
    assert choice.message.tool_calls is None
    assert choice.message.content


def test_auto_with_a_schema_answers_in_either(servers: Callable[[str], openai.OpenAI]) -> None:
    response_format: Any = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "null"}}}
    kinds = set()
    for seed in range(8):
        choice = (
            servers("hermes")
            .chat.completions.create(
                **{**REQUEST, "seed": seed}, tools=[WEATHER], response_format=response_format, logit_bias={"27": 2}
            )
            .choices[0]
        )
        if choice.message.tool_calls:
            kinds.add("calls")
            for call in choice.message.tool_calls:
                assert call.type == "function"
                check_weather(call.function.arguments)
        else:
            kinds.add("null")
            assert choice.message.content == "null"
    assert kinds == {"calls", "null"}


def test_conversations_with_calls_and_results_are_rendered(servers: Callable[[str], openai.OpenAI]) -> None:
    client = servers("hermes")
    first = client.chat.completions.create(**REQUEST, tools=[WEATHER], tool_choice=NAMED)
    (call,) = first.choices[0].message.tool_calls or []
    messages = [
        *HELLO,
        first.choices[0].message,
        {"role": "tool", "tool_call_id": call.id, "content": "rain"},
        {"role": "user", "content": "and now?"},
    ]
    answer = client.chat.completions.create(**{**REQUEST, "messages": messages, "max_tokens": 3}, tools=[WEATHER])
    assert answer.usage is not None
    base = str(client.base_url).removesuffix("/v1/")
    body = {
        "messages": [*HELLO, first.choices[0].message.model_dump(exclude_none=True), *messages[2:]],
        "tools": [WEATHER],
    }
    tokens = httpx.post(f"{base}/tokenize", json=body).json()["tokens"]
    assert len(tokens) == answer.usage.prompt_tokens
    text: str = httpx.post(f"{base}/detokenize", json={"tokens": tokens}).json()["prompt"]
    assert call.type == "function"
    assert f'"arguments": {json.dumps(json.loads(call.function.arguments), ensure_ascii=False)}' in text
    assert "tool\nrain" in text
    assert '"name": "get_weather"' in text


def test_tools_are_not_shown_where_none_may_be_called(servers: Callable[[str], openai.OpenAI]) -> None:
    client = servers("hermes")
    request = {**REQUEST, "max_tokens": 1}
    usages = [
        client.chat.completions.create(**request, **more).usage
        for more in ({}, {"tools": [WEATHER], "tool_choice": "none"}, {"tools": [WEATHER]})
    ]
    counts = [usage.prompt_tokens for usage in usages if usage is not None]
    assert counts[0] == counts[1] < counts[2]


def test_reasoning_comes_before_what_is_forced(servers: Callable[[str], openai.OpenAI]) -> None:
    # The prompt ends inside the reasoning, which a random model does not end.
    choice = (
        servers("thinking")
        .chat.completions.create(**{**REQUEST, "max_tokens": 20}, tools=[WEATHER], tool_choice=NAMED, extra_body=THINK)
        .choices[0]
    )
    assert choice.finish_reason == "length"
    assert choice.message.content == ""
    assert choice.message.tool_calls is None
    assert choice.message.model_extra is not None
    assert choice.message.model_extra["reasoning_content"]
    # Where it has not begun it may be left out.
    request = {**REQUEST, "logit_bias": {str(ord("o") - 33): 20}}
    called = servers("thinking").chat.completions.create(**request, tools=[WEATHER], tool_choice=NAMED).choices[0]
    assert called.finish_reason == "tool_calls"


# ---- what a model says of its own accord


def talk(path: Path, chains: list[list[str]], template: str, **request: Any) -> ChatCompletion:
    """Return what a model that says ``chains`` answers, the same streamed and whole."""
    make_talker(path, chains, template)
    with (
        serve_checkpoint(path, ServerConfig(served_names=("tiny",))) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
    ):
        given = {"model": "tiny", "messages": HELLO, "temperature": 0, "max_tokens": 300, **request}
        answer: ChatCompletion = client.chat.completions.create(**given)
        with client.chat.completions.stream(**given) as stream:
            streamed = stream.get_final_completion().choices[0]
    whole = answer.choices[0]
    assert streamed.finish_reason == whole.finish_reason
    assert (streamed.message.content or None) == (whole.message.content or None)
    streamed_calls, whole_calls = streamed.message.tool_calls or [], whole.message.tool_calls or []
    assert len(streamed_calls) == len(whole_calls)
    for one, other in zip(streamed_calls, whole_calls, strict=True):
        assert other.type == "function"
        assert (one.function.name, one.function.arguments) == (other.function.name, other.function.arguments)
    return answer


BEGIN, WEATHER_BEGINS = "<tool_call>\n", '{"name": "get_weather", "arguments": '


def test_a_call_that_the_model_makes(tmp_path: Path) -> None:
    chain = ["I will look.", BEGIN, WEATHER_BEGINS, '{"city": "Oslo", "unit": "C"}', "}\n</tool_call>"]
    choice = talk(tmp_path, [chain], HERMES, tools=[WEATHER]).choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "I will look."
    (call,) = choice.message.tool_calls or []
    assert call.type == "function"
    assert (call.function.name, call.function.arguments) == ("get_weather", '{"city": "Oslo", "unit": "C"}')


def test_a_call_that_would_go_wrong_is_put_right(tmp_path: Path) -> None:
    # The model wants to go on with what the schema forbids, twice, and does not know how to go on otherwise.
    chains = [[BEGIN, WEATHER_BEGINS, '{"town": 3}', "}\n</tool_call>"], ['{"city": ', '"Oslo"', ', "unit": ', '"K"']]
    message = talk(tmp_path, chains, HERMES, tools=[WEATHER]).choices[0].message
    for call in message.tool_calls or []:
        assert call.type == "function"
        check_weather(call.function.arguments)
    assert message.tool_calls


def test_reasoning_that_the_model_does(tmp_path: Path) -> None:
    chain = ["<think>", "\nIs it?\n", "</think>", "\n\nIt is."]
    choice = talk(tmp_path, [chain], THINKING).choices[0]
    assert choice.message.content == "It is."
    assert choice.message.model_extra is not None
    assert choice.message.model_extra["reasoning_content"] == "Is it?"
    assert choice.finish_reason == "stop"


def test_reasoning_before_a_schema(tmp_path: Path) -> None:
    response_format: Any = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"enum": ["yes", "no"]}}}
    chain = ["<think>", "anything at all", "</think>", '"no"']
    message = talk(tmp_path, [chain], THINKING, response_format=response_format).choices[0].message
    assert message.content == '"no"'
    assert message.model_extra is not None
    assert message.model_extra["reasoning_content"] == "anything at all"


SAID = (
    *("<thi", "nk>\nI wo", "nder.", "\n</th", "ink>\n\nLet me", " see.\n<tool", "_call>\n{"),
    *('"name": "get_we', 'ather", "argum', 'ents": {"city": "O', "slo", '", "unit": "C"}', "}\n</tool_call>"),
    '\n<tool_call>{"name": "clock"}</tool_call>',
)


@pytest.mark.parametrize(
    "pieces", [SAID, ("".join(SAID),), tuple("".join(SAID))], ids=["pieces", "whole", "characters"]
)
async def test_reasoning_text_and_calls_are_told_apart(pieces: tuple[str, ...]) -> None:
    engine = saying(*pieces)
    async with openai_over(engine, template=THINKING) as client:
        request: dict[str, Any] = {"model": "fake", "messages": HELLO, "tools": [CLOCK, WEATHER]}
        message = (await client.chat.completions.create(**request)).choices[0].message
        stream = await client.chat.completions.create(**request, stream=True)
        chunks = [choice.delta for chunk in [chunk async for chunk in stream] for choice in chunk.choices]
    assert engine.requests[0].sampling.skip_special_tokens, "these marks are ordinary text to this tokenizer"
    assert message.content == "Let me see."
    assert message.model_extra is not None
    assert message.model_extra["reasoning_content"] == "I wonder."
    calls = [call.function for call in message.tool_calls or [] if call.type == "function"]
    assert [(call.name, call.arguments) for call in calls] == [
        ("get_weather", '{"city": "Oslo", "unit": "C"}'),
        ("clock", "{}"),
    ]
    assert "".join(chunk.content or "" for chunk in chunks) == "Let me see."
    assert "".join((chunk.model_extra or {}).get("reasoning_content", "") for chunk in chunks) == "I wonder."
    streamed = [call for chunk in chunks for call in chunk.tool_calls or []]
    names = [call.function.name for call in streamed if call.function is not None and call.function.name]
    assert names == ["get_weather", "clock"]
    for index, call in enumerate(calls):
        pieces_of = [
            one.function.arguments or "" for one in streamed if one.index == index and one.function is not None
        ]
        assert "".join(pieces_of) == call.arguments


@pytest.mark.parametrize(("is_thinking", "expected"), [(True, ("why", "yes")), (False, (None, "why</think>yes"))])
async def test_reasoning_that_the_prompt_began(is_thinking: bool, expected: tuple[str | None, str]) -> None:
    async with openai_over(saying("why", "</think>", "yes"), template=THINKING) as client:
        answer = await client.chat.completions.create(
            model="fake", messages=HELLO, extra_body={"chat_template_kwargs": {"enable_thinking": is_thinking}}
        )
    message = answer.choices[0].message
    assert ((message.model_extra or {}).get("reasoning_content"), message.content) == expected


async def test_calls_are_only_looked_for_where_tools_are_offered() -> None:
    said = '<tool_call>{"name": "clock"}</tool_call>'
    async with openai_over(saying(said), template=HERMES) as client:
        plain = await client.chat.completions.create(model="fake", messages=HELLO)
        none = await client.chat.completions.create(model="fake", messages=HELLO, tools=[CLOCK], tool_choice="none")
        one = await client.chat.completions.create(
            model="fake", messages=HELLO, tools=[CLOCK], parallel_tool_calls=False
        )
    assert [answer.choices[0].message.content for answer in (plain, none, one)] == [said, said, None]
    assert [answer.choices[0].finish_reason for answer in (plain, none, one)] == ["stop", "stop", "tool_calls"]


async def test_a_format_may_be_named_by_the_operator() -> None:
    template = "{{ tools }}{{ messages }}"
    said = '[TOOL_CALLS][{"name": "clock", "arguments": {}}]'
    async with openai_over(saying(said), template=template) as client:
        with pytest.raises(openai.BadRequestError, match="--tool-call-parser"):
            await client.chat.completions.create(model="fake", messages=HELLO, tools=[CLOCK])
    async with openai_over(saying(said), ServerConfig(tool_call_parser="mistral"), template=template) as client:
        answer = await client.chat.completions.create(model="fake", messages=HELLO, tools=[CLOCK])
    (call,) = answer.choices[0].message.tool_calls or []
    assert len(call.id) == 9


# ---- what is refused


OTHER = {"type": "function", "function": {"name": "x"}}
BAD_CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "[]"}}
BAD_TOOL: Any = {
    "type": "function",
    "function": {"name": "bad", "parameters": {"properties": {"a": {"type": "wrong"}}}},
}

STRICT_TOOL: Any = {**BAD_TOOL, "function": {**BAD_TOOL["function"], "strict": True}}


@pytest.mark.parametrize(
    ("change", "param", "message"),
    [
        ({"tool_choice": "required"}, "tool_choice", "needs tools"),
        (
            {"tools": [WEATHER], "tool_choice": OTHER},
            "tool_choice.function.name",
            "get_weather",
        ),
        ({"tools": [WEATHER, WEATHER]}, "tools", "same name"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name", "a b"),
        (
            {"tools": [WEATHER, BAD_TOOL], "tool_choice": "required"},
            "tools.1.function.parameters.properties.a",
            "wrong",
        ),
        (
            {"tools": [STRICT_TOOL]},
            "tools.0.function.parameters.properties.a",
            "wrong",
        ),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type", "web_search"),
        ({"messages": [{"role": "user"}]}, "messages.0.content", "missing"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.tool_call_id", "missing"),
        (
            {"messages": [{"role": "user", "content": "x", "tool_calls": []}]},
            "messages.0.tool_calls",
            "only an assistant",
        ),
        (
            {
                "messages": [
                    {
                        "role": "assistant",
                        "tool_calls": [BAD_CALL],
                    }
                ]
            },
            "messages.0.tool_calls.0.function.arguments",
            "not a JSON object",
        ),
    ],
)
def test_what_is_wrong_is_said_where_it_stands(
    servers: Callable[[str], openai.OpenAI], change: dict[str, Any], param: str, message: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        servers("hermes").chat.completions.create(**{**REQUEST, "extra_body": change})
    assert caught.value.param == param
    assert message.lower() in caught.value.message.lower()


def test_a_schema_nobody_can_enforce_is_no_reason_to_refuse_a_voluntary_call(
    servers: Callable[[str], openai.OpenAI],
) -> None:
    answer = servers("hermes").chat.completions.create(**{**REQUEST, "max_tokens": 3}, tools=[BAD_TOOL])
    assert answer.choices[0].message.content


def test_a_model_without_tools_says_so(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="no place for tools"):
        client.chat.completions.create(model="tiny", messages=HELLO, tools=[WEATHER])
