"""Every format's parser: what it finds, and that it finds the same however the text is cut."""

import itertools
import json
from collections.abc import Iterable
from typing import get_args, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.server import ServerConfig
from penstock.text.tool_formats import FORMATS, Arguments, CallBegins, Content, Event, Tool, format_of

TOOLS = (
    Tool(name="f", schema={"type": "object", "properties": {"a": {"type": "integer"}, "s": {"$ref": "#/$defs/s"}},
                           "$defs": {"s": {"type": "string"}}}),
    Tool(name="get_weather", schema={"type": "object", "properties": {"city": {"type": "string"}}}),
)  # fmt: skip


def summed(events: Iterable[Event]) -> list[list[object]]:
    """Return events with neighbours that belong together in one piece."""
    whole: list[list[object]] = []
    for event in events:
        match event:
            case Content(text):
                key: list[object] = ["content"]
            case Arguments(index, text):
                key = ["arguments", index]
            case CallBegins(index, text):
                whole.append(["call", index, text])
                continue
        if whole and whole[-1][:-1] == key:
            whole[-1][-1] = str(whole[-1][-1]) + text
        else:
            whole.append([*key, text])
    return whole


def parsed(name: str, pieces: Iterable[str], most_calls: int | None = None) -> list[list[object]]:
    parser = FORMATS[name].parser(TOOLS, most_calls)
    events = [event for piece in pieces for event in parser.push(piece)]
    return summed([*events, *parser.finish()])


ONE = [["call", 0, "f"], ["arguments", 0, '{"a": 1}']]
NONE = [["call", 0, "f"], ["arguments", 0, "{}"]]
TWO = [*ONE, ["call", 1, "get_weather"], ["arguments", 1, '{"city": "x}]\\"{"}']]
QF = "<tool_call>\n<function=f>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call>"
QW = '<tool_call>\n<function=get_weather>\n<parameter=city>\nx}]"{\n</parameter>\n</function>\n</tool_call>'


def tagged(*parameters: str) -> str:
    return f"<tool_call><function=f>{''.join(parameters)}</function></tool_call>"


def one(arguments: str) -> list[list[object]]:
    return [["call", 0, "f"], ["arguments", 0, arguments]]


F, W = '{"name": "f", "arguments": {"a": 1}}', '{"name": "get_weather", "arguments": {"city": "x}]\\"{"}}'


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("hermes", "no call < here", [["content", "no call < here"]]),
        ("hermes", f"<tool_call>\n{F}\n</tool_call>", ONE),
        ("hermes", f"<tool_call>\n{F}\n</tool_call>\n<tool_call>\n{W}\n</tool_call>\n", TWO),
        ("hermes", f"<tool_call>{F}</tool_call><tool_call>{W}", TWO),
        ("hermes", f"Let me see.\n\n<tool_call>{F}</tool_call> \n", [["content", "Let me see."], *ONE]),
        ("hermes", f"<tool_call>{F}</tool_call>\ndone", [*ONE, ["content", "\ndone"]]),
        ("hermes", '<tool_call>{"arguments": {"a": 1}, "id": [7, "}"], "name": "f"}</tool_call>', ONE),
        ("hermes", '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', ONE),
        ("hermes", '<tool_call>{"name": "f", "arguments": null}</tool_call>', NONE),
        ("hermes", '<tool_call>{"name": "f"}</tool_call>', NONE),
        ("hermes", '<tool_call>{"name": "f", "name": "f", "arguments": {"a": 1}, "arguments": {}}</tool_call>', ONE),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a"', [["call", 0, "f"], ["arguments", 0, '{"a"']]),
        ("mistral", "no call [here]", [["content", "no call [here]"]]),
        ("mistral", f"[TOOL_CALLS][{F}]", ONE),
        ("mistral", f"[TOOL_CALLS] [{F}, {W}] ", TWO),
        ("mistral", f"Well.[TOOL_CALLS][{F}", [["content", "Well."], *ONE]),
        ("mistral_args", "no call [here]", [["content", "no call [here]"]]),
        ("mistral_args", '[TOOL_CALLS]f[ARGS]{"a": 1}', ONE),
        ("mistral_args", '[TOOL_CALLS]f[CALL_ID]123456789[ARGS]{"a": 1}', ONE),
        (
            "mistral_args",
            'W.[TOOL_CALLS]f[ARGS]{"a": 1}[TOOL_CALLS]get_weather[ARGS]{"city": "x}]\\"{"}',
            [["content", "W."], *TWO],
        ),
        ("mistral_args", '[TOOL_CALLS] f [ARGS] {"a": 1} done', [*ONE, ["content", " done"]]),
        ("mistral_args", '[TOOL_CALLS]f[ARGS]{"a"', [["call", 0, "f"], ["arguments", 0, '{"a"']]),
        ("qwen3_coder", "no call < here", [["content", "no call < here"]]),
        ("qwen3_coder", QF, ONE),
        ("qwen3_coder", f"Well.\n{QF}\n{QW}\n", [["content", "Well."], *TWO]),
        ("qwen3_coder", f"{QF}\ndone", [*ONE, ["content", "\ndone"]]),
        ("qwen3_coder", tagged(), one("{}")),
        ("qwen3_coder", tagged("<parameter=s>x</parameter>", "<parameter=a>2</parameter>"), one('{"s": "x", "a": 2}')),
        ("qwen3_coder", tagged("<parameter=s>\n\na\n\n</parameter>"), one('{"s": "\\na\\n"}')),
        ("qwen3_coder", tagged("<parameter=s>\n</parameter>"), one('{"s": ""}')),
        ("qwen3_coder", tagged("<parameter=s>\n</para> é\t</parameter>"), one('{"s": "</para> é\\t"}')),
        ("qwen3_coder", tagged("<parameter=a>\nTrue\n</parameter>"), one('{"a": true}')),
        ("qwen3_coder", tagged("<parameter=a>\nnot JSON\n</parameter>"), one('{"a": "not JSON"}')),
        ("qwen3_coder", tagged("<parameter=a>\nNaN\n</parameter>"), one('{"a": "NaN"}')),
        ("qwen3_coder", tagged('<parameter=other>\n[1, "x"]\n</parameter>'), one('{"other": [1, "x"]}')),
        ("qwen3_coder", "<tool_call><function=f><parameter=s>ab", one('{"s": "ab')),
        ("llama3_json", 'text {"name": "f"}', [["content", 'text {"name": "f"}']]),
        ("llama3_json", F.replace("arguments", "parameters"), ONE),
        ("llama3_json", f"{F}; {W}\n", TWO),
        ("llama3_json", f"\n<|python_tag|>{F};{W}", TWO),
        ("llama3_json", '{"answer": [1, 2]} is it', [["content", '{"answer": [1, 2]} is it']]),
        ("llama3_json", f"{F} and more", [*ONE, ["content", " and more"]]),
    ],
)
def test_what_is_found(name: str, text: str, expected: list[list[object]]) -> None:
    assert parsed(name, [text]) == expected
    assert parsed(name, text) == expected, "a character at a time"
    for cut in range(len(text)):
        assert parsed(name, [text[:cut], text[cut:]]) == expected


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("hermes", '<tool_call>{"name": "unknown", "arguments": {}}</tool_call>'),
        ("hermes", '<tool_call>{"arguments": {"a": 1}}</tool_call>'),
        ("hermes", '<tool_call>{"name": 3}</tool_call>'),
        ("hermes", "<tool_call>[]</tool_call>"),
        ("hermes", '<tool_call>{"na'),
        ("hermes", "<tool_ca"),
        ("mistral", '[TOOL_CALLS][{"name": "unknown"}]'),
        ("mistral", "[TOOL_CALLS]f{}"),
        ("mistral", "[TOOL_CALLS][]"),
        ("mistral", "[TOOL_CALLS]\n"),
        ("mistral_args", "[TOOL_CALLS]unknown[ARGS]{}"),
        ("mistral_args", "[TOOL_CALLS]f[ARGS][]"),
        ("mistral_args", "[TOOL_CALLS]f[AR"),
        ("mistral_args", f"[TOOL_CALLS][{F}]"),
        ("mistral_args", "[TOOL_CALLS]" + "f" * 300 + "[ARGS]{}"),
        ("qwen3_coder", "<tool_call>\n<function=unknown>\n</function>\n</tool_call>"),
        ("qwen3_coder", f"<tool_call>\n{F}\n</tool_call>"),
        ("qwen3_coder", "<tool_call>\n<function=f"),
        ("qwen3_coder", "<tool_call>\n<func"),
        ("llama3_json", '  {"name": "unknown", "parameters": {}}'),
        ("llama3_json", '{"name": "f'),
        ("llama3_json", "<|python_tag|>print(1)"),
        ("llama3_json", "<|pyth"),
        ("llama3_json", "\n"),
    ],
)
def test_what_is_no_call_is_content_unchanged(name: str, text: str) -> None:
    assert parsed(name, [text]) == [["content", text]]
    assert parsed(name, text) == [["content", text]]


@pytest.mark.parametrize(
    ("name", "text"), [("hermes", f"<tool_call>{F}</tool_call>" * 3), ("mistral", f"[TOOL_CALLS][{F}, {W}]")]
)
def test_no_more_calls_than_were_asked_for(name: str, text: str) -> None:
    assert parsed(name, text, most_calls=1) == ONE


FRAGMENTS = st.sampled_from(
    [
        "<tool_call>", "</tool_call>", "[TOOL_CALLS]", "<|python_tag|>", "{", "}", "[", "]", ",", "; ", ":", '"', "\\",
        '"name"', '"arguments"', '"parameters"', ': "f"', ': "zzz"', ': {"a": 1}', '"{\\"a\\": 1}"', "null", "1", " ",
        "[ARGS]", "[CALL_ID]", "<function=", "f", ">", "</function>", "<parameter=", "a>", "</parameter>", "<param",
        QF, QW,
        '[TOOL_CALLS]f[ARGS]{"a": 1}', "\n", "text", "é", F, W, f"<tool_call>{F}</tool_call>", f"[TOOL_CALLS][{F}]",
        "<tool", "[TOOL", "<|py",
    ]
)  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
@given(fragments=st.lists(FRAGMENTS, max_size=12), cuts=st.lists(st.integers(0, 400), max_size=8))
def test_the_same_however_it_is_cut(name: str, fragments: list[str], cuts: list[int]) -> None:
    text = "".join(fragments)
    places = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    pieces = [text[start:end] for start, end in itertools.pairwise(places)]
    whole = parsed(name, [text])
    assert parsed(name, pieces) == whole
    assert parsed(name, text) == whole
    calls = [event for event in whole if event[0] == "call"]
    assert [event[1] for event in calls] == list(range(len(calls)))
    assert all(event[2] in [tool.name for tool in TOOLS] for event in calls)
    if not calls:
        assert "".join(str(event[-1]) for event in whole) == text, "nothing is lost where nothing was found"


@given(
    arguments=st.dictionaries(
        st.text(max_size=5), st.recursive(st.text() | st.integers() | st.none(), st.lists, max_leaves=5)
    ),
    indent=st.sampled_from([None, 2]),
    is_ascii=st.booleans(),
)
def test_any_arguments_come_through(arguments: dict[str, object], indent: int | None, is_ascii: bool) -> None:
    call = json.dumps({"name": "f", "arguments": arguments}, indent=indent, ensure_ascii=is_ascii)
    for name, text in (
        ("hermes", f"<tool_call>\n{call}\n</tool_call>"),
        ("mistral", f"[TOOL_CALLS][{call}]"),
        ("mistral_args", f"[TOOL_CALLS]f[ARGS]{json.dumps(arguments, indent=indent, ensure_ascii=is_ascii)}"),
        ("llama3_json", call),
    ):
        begin, rest = parsed(name, text)
        assert begin == ["call", 0, "f"]
        assert json.loads(str(rest[-1])) == arguments


def test_formats_are_known_by_their_templates() -> None:
    assert format_of("{{ '<tool_call>' }}") is FORMATS["hermes"]
    assert format_of("<tool_call>\n<function=f>") is FORMATS["qwen3_coder"]
    assert format_of("[TOOL_CALLS]") is FORMATS["mistral"]
    assert format_of("[TOOL_CALLS]f[ARGS]{}") is FORMATS["mistral_args"]
    assert format_of("<|python_tag|>") is FORMATS["llama3_json"]
    assert format_of("{{ messages }}") is None
    chosen = get_args(get_type_hints(ServerConfig)["tool_call_parser"])
    assert {name for kind in chosen for name in get_args(kind)} == set(FORMATS)
