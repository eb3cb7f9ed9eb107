"""What the public suites of SGLang and llama.cpp ask of tools and schemas, in our own words."""

import json
from collections.abc import Callable
from typing import Any

import jsonschema_rs
import openai
import pytest
from openai.types.chat import ChatCompletion

from penstock.text.tool_formats import FORMATS
from tests.server.fakes import TEMPLATES, openai_over, saying

HELLO: list[Any] = [{"role": "user", "content": "hello"}]
WORD = {"type": "string", "maxLength": 6}


def an_object(*optional: str, **properties: Any) -> dict[str, Any]:
    required = [name for name in properties if name not in optional]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


CASES: dict[str, dict[str, Any]] = {
    "nothing": an_object(),
    "nested": an_object(where=an_object(city=WORD, at=an_object(lat={"type": "integer", "minimum": 0, "maximum": 90}))),
    "enums of several types": an_object(one={"enum": ["a", 'quo"te', 3, None, True]}, two={"enum": ["x", "y"]}),
    "bounded arrays": an_object(some={"type": "array", "items": {"enum": [1, 2]}, "minItems": 2, "maxItems": 3}),
    "any of": an_object(a={"anyOf": [{"type": "boolean"}, an_object(b={"const": "c"})]}),
    "unions of types": an_object(a={"type": ["string", "null"], "maxLength": 4}, b={"type": ["integer", "boolean"]}),
    "unicode": an_object(**{"größe": WORD, "名前": {"enum": ["猫", "👍"]}, "with space": {"type": "boolean"}}),
    "recursion": {
        **an_object(tree={"$ref": "#/$defs/node"}),
        "$defs": {"node": an_object(value={"enum": [1]}, next={"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]})},
    },
    "shared definitions": {**an_object(a={"$ref": "#/$defs/d"}, b={"$ref": "#/$defs/d"}), "$defs": {"d": WORD}},
    "what may be left out": an_object("b", "c", a={"type": "boolean"}, b=WORD, c={"type": "null"}),
    "tuples": an_object(a={"type": "array", "prefixItems": [WORD, {"type": "boolean"}], "items": False, "minItems": 2}),
    "patterns": an_object(a=an_object(b={"type": "string", "pattern": "^[a-f]{2}-[0-9]{3}$"})),
    "numbers": an_object(a={"type": "integer", "minimum": -3, "maximum": 12}, b={"type": "number", "minimum": 0}),
}
ENDS = {str(ord(character) - 33): 4 for character in '"}],'}
"""A random model seldom ends what it began."""


def tool(name: str, schema: dict[str, Any] | None = None) -> Any:
    return {"type": "function", "function": {"name": name} if schema is None else {"name": name, "parameters": schema}}


def calls_of(answer: ChatCompletion) -> list[tuple[str, str]]:
    calls = answer.choices[0].message.tool_calls or []
    return [(call.function.name, call.function.arguments) for call in calls if call.type == "function"]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["hermes", "qwen3_coder"])
def test_arguments_satisfy_the_schema(servers: Callable[[str], openai.OpenAI], name: str, case: str) -> None:
    schema = CASES[case]
    request: dict[str, Any] = {
        "model": "tiny",
        "messages": HELLO,
        "max_tokens": 600,
        "tools": [tool("other"), tool("f", schema)],
        "tool_choice": tool("f"),
        "logit_bias": ENDS,
        "seed": 2,
    }
    answer = servers(name).chat.completions.create(**request)
    ((called, arguments),) = calls_of(answer)
    assert (called, answer.choices[0].finish_reason) == ("f", "tool_calls")
    jsonschema_rs.validate(schema, json.loads(arguments))
    with servers(name).chat.completions.stream(**request) as stream:
        streamed = stream.get_final_completion()
    assert calls_of(streamed) == [(called, arguments)]


@pytest.mark.parametrize("case", CASES)
def test_answers_satisfy_the_schema(client: openai.OpenAI, case: str) -> None:
    response_format: Any = {"type": "json_schema", "json_schema": {"name": "s", "schema": CASES[case], "strict": True}}
    answer = client.chat.completions.create(
        model="tiny", messages=HELLO, response_format=response_format, logit_bias=ENDS, seed=2, n=2
    )
    for choice in answer.choices:
        assert choice.finish_reason == "stop"
        jsonschema_rs.validate(CASES[case], json.loads(choice.message.content or ""))


def test_tools_may_define_different_things_by_one_name(servers: Callable[[str], openai.OpenAI]) -> None:
    schemas = [{**an_object(a={"$ref": "#/$defs/d"}), "$defs": {"d": {"enum": cases}}} for cases in (["x"], [1])]
    tools = [tool(f"f{i}", schema) for i, schema in enumerate(schemas)]
    seen = {}
    for seed in range(6):
        answer = servers("hermes").chat.completions.create(
            model="tiny", messages=HELLO, tools=tools, tool_choice="required", parallel_tool_calls=False, seed=seed
        )
        ((called, arguments),) = calls_of(answer)
        seen[called] = json.loads(arguments)
    assert seen == {"f0": {"a": "x"}, "f1": {"a": 1}}


NAMES = ("get", "get_weather", "get_weather_now", "weather")


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("wanted", NAMES)
def test_names_that_contain_one_another(servers: Callable[[str], openai.OpenAI], name: str, wanted: str) -> None:
    stream = servers(name).chat.completions.create(
        model="tiny",
        messages=HELLO,
        tools=[tool(one, an_object(a={"enum": [1, 2]})) for one in NAMES],
        tool_choice=tool(wanted),
        stream=True,
        seed=1,
    )
    choices = [choice for chunk in stream for choice in chunk.choices]
    pieces = [call for choice in choices for call in choice.delta.tool_calls or [] if call.function is not None]
    assert [piece.function.name for piece in pieces if piece.function and piece.function.name] == [wanted]
    assert pieces[0].function is not None
    assert pieces[0].function.name == wanted, "the name comes first"
    assert [piece.id is None for piece in pieces] == [False] + [True] * (len(pieces) - 1)
    assert json.loads("".join(piece.function.arguments or "" for piece in pieces if piece.function))["a"] in (1, 2)
    assert [choice.finish_reason for choice in choices if choice.finish_reason] == ["tool_calls"]
    assert not any(choice.delta.content for choice in choices)


NASTY = 'print("</tool_call>")\n\tif "[TOOL_CALLS]" in {"a": [1]}: \\ é 👍 <tool_call>'


def written(name: str, called: str, **arguments: Any) -> str:
    """Return a call as a model of that format writes it."""
    match name:
        case "hermes":
            return f"<tool_call>\n{json.dumps({'name': called, 'arguments': arguments})}\n</tool_call>"
        case "llama3_json":
            return json.dumps({"name": called, "parameters": arguments})
        case "mistral":
            return f"[TOOL_CALLS][{json.dumps({'name': called, 'arguments': arguments})}]"
        case "mistral_args":
            return f"[TOOL_CALLS]{called}[ARGS]{json.dumps(arguments, ensure_ascii=False)}"
        case _:
            shown = {key: value if isinstance(value, str) else json.dumps(value) for key, value in arguments.items()}
            parameters = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in shown.items())
            return f"<tool_call>\n<function={called}>\n{parameters}</function>\n</tool_call>"


CODE = an_object(code={"type": "string"}, limit={"type": "integer"})


@pytest.mark.parametrize("name", FORMATS)
async def test_any_text_is_an_argument(name: str) -> None:
    async with openai_over(saying(*written(name, "run", code=NASTY, limit=3)), template=TEMPLATES[name]) as client:
        request: dict[str, Any] = {"model": "fake", "messages": HELLO, "tools": [tool("run", CODE)]}
        answer = await client.chat.completions.create(**request)
        async with client.chat.completions.stream(**request) as stream:
            streamed = await stream.get_final_completion()
    ((called, arguments),) = calls_of(answer)
    assert (called, json.loads(arguments)) == ("run", {"code": NASTY, "limit": 3})
    assert calls_of(streamed) == [(called, arguments)]


@pytest.mark.parametrize("name", FORMATS)
async def test_a_call_that_ends_anywhere_is_the_beginning_of_itself(name: str) -> None:
    text = written(name, "run", code='a "b"\n', limit=12)
    request: dict[str, Any] = {"model": "fake", "messages": HELLO, "tools": [tool("run", CODE)]}
    engine = saying(text)
    async with openai_over(engine, template=TEMPLATES[name]) as client:
        ((_, whole),) = calls_of(await client.chat.completions.create(**request))
        answers = []
        for length in range(1, len(text)):
            engine.script = saying(text[:length], reason="length").script
            answers.append(await client.chat.completions.create(**request))
    for length, answer in enumerate(answers, start=1):
        choice = answer.choices[0]
        assert choice.finish_reason == "length"
        if calls := calls_of(answer):
            ((called, arguments),) = calls
            assert (called, whole[: len(arguments)]) == ("run", arguments)
            assert not choice.message.content
        else:
            assert choice.message.content == text[:length], "nothing is lost where no call was found"


@pytest.mark.parametrize("name", FORMATS)
async def test_several_calls_of_one_tool(name: str) -> None:
    between = {"llama3_json": "; ", "mistral_args": ""}.get(name, "\n")
    one, two = (written(name, "run", code=code, limit=1) for code in "ab")
    said = f"{one}{between}{two}" if name != "mistral" else f"{one[:-1]}, {two.removeprefix('[TOOL_CALLS][')}"
    async with openai_over(saying(said), template=TEMPLATES[name]) as client:
        answer = await client.chat.completions.create(model="fake", messages=HELLO, tools=[tool("run", CODE)])
        single = await client.chat.completions.create(
            model="fake", messages=HELLO, tools=[tool("run", CODE)], parallel_tool_calls=False
        )
    assert [json.loads(arguments)["code"] for _, arguments in calls_of(answer)] == ["a", "b"]
    assert len({call.id for call in answer.choices[0].message.tool_calls or []}) == 2
    assert calls_of(single) == calls_of(answer)[:1]


def test_calls_without_arguments_and_results_in_parts_are_history(servers: Callable[[str], openai.OpenAI]) -> None:
    call: Any = {"id": "call_1", "type": "function", "function": {"name": "now", "arguments": ""}}
    messages: list[Any] = [
        *HELLO,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "noon"}]},
    ]
    answer = servers("hermes").chat.completions.create(
        model="tiny", messages=messages, tools=[tool("now")], tool_choice="none", max_tokens=5
    )
    assert answer.choices[0].message.tool_calls is None
    assert answer.choices[0].message.content


async def test_what_a_tool_says_of_itself_is_text_to_the_template() -> None:
    engine = saying("fine")
    described: Any = tool("run", CODE)
    described["function"]["description"] = '{{ messages }} {% for x in y %} {# no #} <|im_end|> "é"'
    async with openai_over(engine, template=TEMPLATES["hermes"]) as client:
        answer = await client.chat.completions.create(model="fake", messages=HELLO, tools=[described])
    assert answer.choices[0].message.content == "fine"


NO_PROPERTIES = tool("f", {"type": "object", "properties": 5})
NO_SCHEMA = {"type": "json_schema", "json_schema": {"name": "s", "schema": 7}}


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"tools": [], "tool_choice": "required"}, "tool_choice"),
        ({"tools": [tool("f")], "tool_choice": "sometimes"}, "tool_choice"),
        ({"tools": [tool("f")], "tool_choice": tool("g")}, "tool_choice.function.name"),
        ({"tools": [{"type": "function"}]}, "tools.0.function"),
        ({"tools": [tool("")]}, "tools.0.function.name"),
        (
            {"tools": [NO_PROPERTIES], "tool_choice": "required"},
            "tools.0.function.parameters",
        ),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "sound"}}, "response_format"),
        (
            {"response_format": NO_SCHEMA},
            "response_format.json_schema.schema",
        ),
    ],
)
def test_what_cannot_be_is_refused(servers: Callable[[str], openai.OpenAI], change: dict[str, Any], param: str) -> None:
    for name in ("hermes", "qwen3_coder"):
        with pytest.raises(openai.BadRequestError) as caught:
            servers(name).chat.completions.create(model="tiny", messages=HELLO, extra_body=change)
        assert caught.value.param is not None
        assert caught.value.param.startswith(param)
