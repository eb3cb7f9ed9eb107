"""What each format's grammars take and refuse, by themselves and with reasoning or a schema beside them."""

import json

import pytest

from penstock.server.reading import Reading
from penstock.server.structure import Structure
from penstock.server.tools import ToolUse, answers_to
from penstock.text import Tokenizer
from penstock.text.grammar import GrammarCompiler, json_schema_grammar
from penstock.text.tool_formats import FORMATS, Tool
from tests.fakes.tokenizer_files import byte_level_tokenizer

TOKENIZER = Tokenizer.of(byte_level_tokenizer())
COMPILER = GrammarCompiler(TOKENIZER, vocab_size=TOKENIZER.vocab_size, eos_token_ids=(TOKENIZER.vocab_size - 2,))
TOOLS = (
    Tool(name="clock", schema={"properties": {"zone": {"$ref": "#/$defs/z"}}, "$defs": {"z": {"enum": ["utc"]}},
                               "type": "object", "required": ["zone"], "additionalProperties": False}),
    Tool(name="stop", schema={"type": "object", "properties": {}, "additionalProperties": False}),
)  # fmt: skip
NULL = Structure(param="x", write=lambda: json_schema_grammar({"type": "null"}))
KEY = {"llama3_json": "parameters"}


def tagged(called: str, **arguments: str) -> str:
    parameters = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in arguments.items())
    return f"<tool_call>\n<function={called}>\n{parameters}</function>\n</tool_call>"


def calls(name: str, *written: str) -> str:
    objects = [one.replace("ARGS", f'"{KEY.get(name, "arguments")}"') for one in written]
    parsed = [(one[KEY.get(name, "arguments")], one["name"]) for one in map(json.loads, objects)]
    match name:
        case "mistral_args":
            return "".join(f"[TOOL_CALLS]{called}[ARGS]{json.dumps(arguments)}" for arguments, called in parsed)
        case "qwen3_coder":
            return "\n".join(tagged(called, **arguments) for arguments, called in parsed)
        case "hermes":
            return "\n".join(f"<tool_call>\n{one}\n</tool_call>" for one in objects)
        case "mistral":
            return f"[TOOL_CALLS][{', '.join(objects)}]"
        case _:
            return "; ".join(objects)


CLOCK, STOP = '{"name": "clock", ARGS: {"zone": "utc"}}', '{"name": "stop", ARGS: {}}'
WRONG = ('{"name": "clock", ARGS: {"zone": "cet"}}', '{"name": "clock", ARGS: {}}', '{"name": "other", ARGS: {}}')


def takes(text: str, name: str, structure: Structure | None = None, is_open: bool | None = None, **use: bool) -> bool:
    flags = {"is_forced": False, "is_strict": True, "is_parallel": True, **use}
    wanted = ToolUse(shown=None, tools=TOOLS, params=("a", "b"), **flags)
    reading = Reading(reasoning_is_open=is_open, tool_format=FORMATS[name], tools=TOOLS)
    held = answers_to(structure, wanted, reading, TOKENIZER)
    assert held is not None
    matcher = COMPILER.compile(held.write())
    tokens = TOKENIZER.encode(text, add_special_tokens=False)
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


@pytest.mark.parametrize("name", FORMATS)
def test_forced_calls(name: str) -> None:
    assert takes(calls(name, CLOCK), name, is_forced=True)
    assert takes(calls(name, CLOCK, STOP, CLOCK), name, is_forced=True)
    assert takes(calls(name, STOP), name, is_forced=True, is_parallel=False)
    assert not takes(calls(name, CLOCK, STOP), name, is_forced=True, is_parallel=False)
    for text in ("", "text", "text " + calls(name, CLOCK), *(calls(name, wrong) for wrong in WRONG)):
        assert not takes(text, name, is_forced=True), text


@pytest.mark.parametrize("name", FORMATS)
def test_offered_tools(name: str) -> None:
    for text in ("", "text", "a < b [1]", calls(name, CLOCK), calls(name, CLOCK, STOP)):
        assert takes(text, name), text
    for wrong in WRONG:
        assert not takes(calls(name, wrong), name)
        assert not takes(calls(name, STOP, wrong), name)
        if FORMATS[name].commits:
            assert not takes("text " + calls(name, wrong), name)
    if FORMATS[name].commits:
        assert takes("text " + calls(name, CLOCK), name)


@pytest.mark.parametrize("name", FORMATS)
def test_calls_or_a_schema(name: str) -> None:
    assert takes("null", name, NULL)
    assert takes(calls(name, STOP), name, NULL)
    for text in ("text", "null " + calls(name, STOP), calls(name, WRONG[0])):
        assert not takes(text, name, NULL), text
    assert not takes("null", name, NULL, is_forced=True)


@pytest.mark.parametrize("name", FORMATS)
def test_reasoning_first(name: str) -> None:
    call = calls(name, STOP)
    assert takes(f"<think>\nhm <b>\n</think>\n\n{call}", name, is_open=False, is_forced=True)
    assert takes(call, name, is_open=False, is_forced=True)
    assert takes(f"hm</think>{call}", name, is_open=True, is_forced=True)
    assert not takes(call, name, is_open=True, is_forced=True)
    assert not takes(f"<think>hm</think>{call}", name, is_forced=True)
    assert takes("<think>hm</think>null", name, NULL, is_open=False)


def test_voluntary_calls_that_need_no_holding() -> None:
    reading = Reading(tool_format=FORMATS["llama3_json"], tools=TOOLS[1:])
    use = ToolUse(shown=None, tools=TOOLS[1:], params=("a",), is_forced=False, is_strict=False, is_parallel=True)
    assert answers_to(None, use, reading, TOKENIZER) is None
    assert answers_to(None, None, Reading(reasoning_is_open=False), TOKENIZER) is None
    assert answers_to(NULL, None, Reading(), TOKENIZER) is NULL


def test_a_mark_that_is_a_special_token_is_said_as_that_token() -> None:
    backend = byte_level_tokenizer()
    backend.add_special_tokens(["[TOOL_CALLS]"])
    tokenizer = Tokenizer.of(backend)
    compiler = GrammarCompiler(tokenizer, vocab_size=tokenizer.vocab_size, eos_token_ids=(0,))
    use = ToolUse(shown=None, tools=TOOLS[1:], params=("a",), is_forced=True, is_strict=False, is_parallel=True)
    held = answers_to(None, use, Reading(tool_format=FORMATS["mistral"], tools=TOOLS[1:]), tokenizer)
    assert held is not None
    assert Reading(tool_format=FORMATS["mistral"]).needs_special_tokens(tokenizer)
    assert not Reading(tool_format=FORMATS["hermes"], reasoning_is_open=False).needs_special_tokens(tokenizer)
    matcher = compiler.compile(held.write())
    (mark, *rest) = tokenizer.encode(calls("mistral", STOP), add_special_tokens=False)
    assert mark == tokenizer.special_token_id("[TOOL_CALLS]")
    assert matcher.try_consume_tokens([mark, *rest]) == 1 + len(rest)
