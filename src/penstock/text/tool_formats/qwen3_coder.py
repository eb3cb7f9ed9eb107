"""Qwen3-Coder: text, and calls as tags, each between ``<tool_call>`` and ``</tool_call>``::

    <function=name>
    <parameter=key>
    value
    </parameter>
    </function>

A value whose schema says that it is a string is the text itself; any other is JSON.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from penstock.text.grammar import schema_with_options
from penstock.text.markers import at_mark, find_mark
from penstock.text.tool_formats.base import HoldingParser, Spelling, Tool, long_call_id
from penstock.text.tool_formats.tags import CLOSE, OPEN, forced_between_tags, offered_between_tags

_FUNCTION, _END_FUNCTION = "<function=", "</function>"
_PARAMETER, _END_PARAMETER = "<parameter=", "</parameter>"
_MOST_NAME_CHARS = 256
_MOST_REFERENCES = 8
_REFERENCE = re.compile(r"#/(\$defs|definitions)/([^/]+)")
_PYTHON = {"True": "true", "False": "false", "None": "null"}
"""How the template shows these to the model"""


class Qwen3Coder:
    """See the module."""

    name = "qwen3_coder"
    marks: tuple[str, ...] = (OPEN, CLOSE)
    commits = True

    def recognizes(self, template: str) -> bool:
        """Whether a chat template teaches this format."""
        return OPEN in template and _FUNCTION in template

    def parser(self, tools: Sequence[Tool], most_calls: int | None) -> "Qwen3CoderParser":
        """Return a parser for one answer."""
        return Qwen3CoderParser(tools, most_calls)

    def forced(self, tools: Sequence[Tool], spelling: Spelling, *, is_parallel: bool) -> str:
        """Return rules for calls and nothing else."""
        return forced_between_tags(_call_rules(tools), spelling, is_parallel=is_parallel)

    def offered(self, tools: Sequence[Tool], spelling: Spelling, *, is_parallel: bool) -> str:
        """Return rules for text in which the opening tag commits to a call."""
        return offered_between_tags(_call_rules(tools), spelling, is_parallel=is_parallel)

    def call_id(self) -> str:
        """Return an id such as OpenAI's."""
        return long_call_id()


def _call_rules(tools: Sequence[Tool]) -> str:
    """Return rules for what is between the tags.

    Parameters come in the schema's order. Of a string they know the length and the cases; what else a schema says of
    strings, or beside its properties, holds nobody to anything here.
    """
    rules = ["call: " + " | ".join(f"call_{i}" for i in range(len(tools)))]
    for i, tool in enumerate(tools):
        required = tool.schema.get("required")
        parts = []
        if not isinstance(tool.schema.get("properties", {}), dict):
            # The compiler says what is wrong with it.
            parts.append(f"%json {json.dumps(tool.schema)}")
        for j, (key, schema) in enumerate(_properties(tool).items()):
            is_required = isinstance(required, list) and key in required
            parts.append(f"parameter_{i}_{j}" if is_required else f"parameter_{i}_{j}?")
            rules.append(f"parameter_{i}_{j}: {json.dumps(f'{_PARAMETER}{key}>' + chr(10))} value_{i}_{j}")
            rules.append(_value_rule(f"value_{i}_{j}", schema, tool.schema))
        begin, end = json.dumps(f"{_FUNCTION}{tool.name}>\n"), json.dumps(_END_FUNCTION)
        rules.append(f"call_{i}: {' '.join([begin, *parts, end])}")
    return "\n".join(rules)


def _value_rule(name: str, schema: Mapping[str, Any], whole: Mapping[str, Any]) -> str:
    end = json.dumps(f"\n{_END_PARAMETER}\n")
    if not _is_text(schema):
        shared = {key: whole[key] for key in ("$defs", "definitions") if key in whole}
        return f"{name}: %json {json.dumps(schema_with_options({**shared, **schema}))} {end}"
    cases = _cases(schema)
    if cases:
        return f"{name}: ({' | '.join(json.dumps(str(case)) for case in cases)}) {end}"
    least, most = schema.get("minLength"), schema.get("maxLength")
    bounds = f"{least if isinstance(least, int) else 0},{most if isinstance(most, int) else ''}"
    return f"{name}[lazy]: /(?s:.{{{bounds}}})/ {end}"


def _properties(tool: Tool) -> dict[str, Mapping[str, Any]]:
    """Return the schemas of a tool's parameters, references to its own definitions followed."""
    properties = tool.schema.get("properties")
    if not isinstance(properties, dict):
        return {}
    return {key: _followed(schema, tool.schema) for key, schema in properties.items()}


def _followed(schema: Any, whole: Mapping[str, Any]) -> Mapping[str, Any]:
    for _ in range(_MOST_REFERENCES):
        path = _REFERENCE.fullmatch(str(schema.get("$ref"))) if isinstance(schema, dict) else None
        if path is None:
            break
        definitions = whole.get(path[1])
        schema = definitions.get(path[2]) if isinstance(definitions, dict) else None
    return schema if isinstance(schema, dict) else {}


def _cases(schema: Mapping[str, Any]) -> list[Any]:
    cases = [schema["const"]] if "const" in schema else schema.get("enum")
    return cases if isinstance(cases, list) else []


def _is_text(schema: Mapping[str, Any]) -> bool:
    """Whether every value is a string, and so is written as it is."""
    cases = _cases(schema)
    return schema.get("type") == "string" or bool(cases and all(isinstance(case, str) for case in cases))


class Qwen3CoderParser(HoldingParser):
    """See ``ToolParser``."""

    def __init__(self, tools: Sequence[Tool], most_calls: int | None) -> None:
        super().__init__(most_calls)
        self._schemas = {tool.name: _properties(tool) for tool in tools}
        self._read_next = self._read_text
        """Reads on; False if more text is needed"""
        self._before = ""
        """What may yet turn out to be no call"""
        self._parameters: dict[str, Mapping[str, Any]] = {}
        """Of the call at hand"""
        self._num_parameters = 0
        self._key = ""
        self._value: list[str] = []
        """What there is of a value that is not text"""
        self._begins_value = False
        self._newline = ""
        """The end of a value's text, if it is a new line, which may be the last"""

    def _read(self, *, is_final: bool) -> None:
        while self._rest and self._read_next(is_final):
            pass

    def _unfinished(self) -> str:
        return self._before + self._rest if self._before else ""

    def _read_text(self, is_final: bool) -> bool:
        before, after = find_mark(self._rest, OPEN, is_final=is_final)
        self._events.content(before)
        if after is None:
            self._rest = self._rest[len(before) :]
            return False
        self._rest, self._before, self._read_next = after, OPEN, self._read_name
        return True

    def _read_name(self, is_final: bool) -> bool:
        name = self._tag(_FUNCTION)
        if name is None:
            return False
        if name not in self._schemas:
            self._events.content(self._before)
            self._before, self._read_next = "", self._read_text
            return True
        self._before, self._parameters, self._num_parameters = "", self._schemas[name], 0
        self._events.begin(name)
        self._read_next = self._read_key
        return True

    def _read_key(self, is_final: bool) -> bool:
        ends = at_mark(self._rest.lstrip(), _END_FUNCTION)
        key = self._tag(_PARAMETER) if ends is not True else ""
        if ends is None or key is None:
            return False
        if key:
            before = ", " if self._num_parameters else "{"
            self._events.arguments(f"{before}{json.dumps(key, ensure_ascii=False)}: ")
            self._events.arguments('"' if _is_text(self._parameters.get(key, {})) else "")
            self._num_parameters += 1
            self._key, self._value, self._newline, self._begins_value = key, [], "", True
            self._read_next = self._read_value
            return True
        self._rest = self._rest.lstrip()[len(_END_FUNCTION) :] if ends else self._rest
        self._events.arguments("}" if self._num_parameters else "{}")
        self._read_next = self._read_end
        return True

    def _read_value(self, is_final: bool) -> bool:
        before, after = find_mark(self._rest, _END_PARAMETER, is_final=False)
        self._rest = self._rest[len(before) :] if after is None else after
        if before and self._begins_value:
            before, self._begins_value = before.removeprefix("\n"), False
        text = self._newline + before
        self._newline = "\n" if text.endswith("\n") else ""
        text = text.removesuffix("\n")
        if _is_text(self._parameters.get(self._key, {})):
            self._events.arguments(json.dumps(text, ensure_ascii=False)[1:-1])
            end = '"'
        else:
            self._value.append(text)
            end = "" if after is None else _as_json("".join(self._value))
        if after is None:
            return False
        self._events.arguments(end)
        self._read_next = self._read_key
        return True

    def _read_end(self, is_final: bool) -> bool:
        rest = self._rest.lstrip()
        closes = at_mark(rest, CLOSE)
        if closes is None and not is_final:
            return False
        # Whatever else follows a whole call is content.
        self._rest = rest[len(CLOSE) :] if closes else "" if closes is None else self._rest
        self._read_next = self._read_text
        return True

    def _tag(self, mark: str) -> str | None:
        """Return the name in the tag that comes next, empty if there comes none; None while that cannot be said."""
        rest = self._rest.lstrip()
        begins = at_mark(rest, mark)
        name, after = find_mark(rest.removeprefix(mark), ">", is_final=True)
        if begins is not False and after is None and len(name) <= _MOST_NAME_CHARS:
            return None
        if begins is not True or after is None:
            return ""
        self._before += self._rest[: len(self._rest) - len(after)] if mark == _FUNCTION else ""
        self._rest = after
        return name


def _as_json(text: str) -> str:
    """Return a value as JSON: as it is, if it is; else as a string."""
    text = text.strip()
    text = _PYTHON.get(text, text)
    try:
        json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return json.dumps(text, ensure_ascii=False)
    return text


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")
