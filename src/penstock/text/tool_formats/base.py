"""What the formats share: tools, events, and reading one call as JSON."""

import json
import secrets
import string
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Protocol

from penstock.text.grammar import schema_with_options


@dataclass(frozen=True, kw_only=True, slots=True)
class Tool:
    """A function that a model may call."""

    name: str
    schema: Mapping[str, Any]
    """What its arguments must look like."""


@dataclass(frozen=True, slots=True)
class Content:
    """Text that is no call."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegins:
    """A call of ``name``; ``Arguments`` of it may follow."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class Arguments:
    """The next piece of a call's arguments, which together are one JSON object."""

    index: int
    text: str


Event = Content | CallBegins | Arguments


Spelling = Callable[[str], str]
"""Writes a mark as Lark wants it: in quotes, or by its number where it is a special token of the vocabulary."""


class ToolParser(Protocol):
    """Finds calls in text that arrives in pieces. The events' sum does not depend on where it was cut."""

    def push(self, text: str) -> list[Event]:
        """Add text; return what is now certain."""

    def finish(self) -> list[Event]:
        """Return what was held back, when nothing can follow."""


class ToolFormat(Protocol):
    """How a family of models writes calls."""

    name: str
    marks: tuple[str, ...]
    """What begins and ends its calls"""
    commits: bool
    """Whether what begins like a call can be nothing else"""

    def recognizes(self, template: str) -> bool:
        """Whether a chat template teaches this format."""

    def parser(self, names: AbstractSet[str], most_calls: int | None) -> ToolParser:
        """Return a parser for one answer. A call of a name that is not among ``names`` is content."""

    def forced(self, tools: Sequence[Tool], spelling: Spelling, *, is_parallel: bool) -> str:
        """Return Lark rules whose ``answer`` is one call or, if ``is_parallel``, several."""

    def offered(self, tools: Sequence[Tool], spelling: Spelling, *, is_parallel: bool) -> str:
        """Return Lark rules whose ``answer`` is any text in which a call, once begun, is a right one."""

    def call_id(self) -> str:
        """Return an id that the family's templates take back."""


def long_call_id() -> str:
    """Return an id such as OpenAI's."""
    return f"call_{secrets.token_hex(12)}"


def short_call_id() -> str:
    """Return nine letters and digits, the only ids that Mistral's templates take."""
    return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))


def call_rules(tools: Sequence[Tool], arguments_key: str) -> str:
    """Return Lark rules whose ``call`` is a call of one of ``tools``, spelled as ``json.dumps`` would."""
    rules = ["call: " + " | ".join(f"call_{i}" for i in range(len(tools)))]
    for i, tool in enumerate(tools):
        before = f'{{"name": {json.dumps(tool.name)}, "{arguments_key}": '
        rules.append(f'call_{i}: {json.dumps(before)} arguments_{i} "}}"')
    return "\n".join([*rules, argument_rules(tools)])


def argument_rules(tools: Sequence[Tool]) -> str:
    """Return Lark rules ``arguments_0``, ``arguments_1``... for the arguments of each tool."""
    return "\n".join(
        f"arguments_{i}: %json {json.dumps(schema_with_options(tool.schema))}" for i, tool in enumerate(tools)
    )


def any_until(name: str, mark: str) -> str:
    """Return the Lark rule ``name``: any text up to and with the first ``mark``, as a ``Spelling`` has it."""
    laziness = "[lazy]" if mark.startswith('"') else ""
    return f"{name}{laziness}: /(?s:.*)/ {mark}"


class Events:
    """Events in the making. White space before a call, and at the end of an answer that has any, is not content."""

    def __init__(self, most_calls: int | None) -> None:
        self._most_calls = most_calls
        self._num_calls = 0
        self._space = ""
        self._events: list[Event] = []

    def content(self, text: str) -> None:
        """Add text that is no call."""
        whole = self._space + text
        words = whole.rstrip()
        self._space = whole[len(words) :]
        if words:
            self._events.append(Content(words))

    def begin(self, name: str) -> None:
        """Begin a call."""
        self._space = ""
        self._num_calls += 1
        if self._is_wanted:
            self._events.append(CallBegins(self._num_calls - 1, name))

    def arguments(self, text: str) -> None:
        """Add to the arguments of the call that was begun last."""
        if self._is_wanted and text:
            self._events.append(Arguments(self._num_calls - 1, text))

    def finish(self) -> None:
        """End the answer."""
        if self._space and not self._num_calls:
            self._events.append(Content(self._space))
        self._space = ""

    def take(self) -> list[Event]:
        """Return the events since the last time, pieces of one thing as one."""
        events: list[Event] = []
        for index, group in groupby(self._events, key=lambda one: one.index if isinstance(one, Arguments) else None):
            pieces = list(group)
            if index is None:
                events += pieces
            else:
                events.append(Arguments(index, "".join(one.text for one in pieces if isinstance(one, Arguments))))
        self._events = []
        return events

    @property
    def _is_wanted(self) -> bool:
        return self._most_calls is None or self._num_calls <= self._most_calls


class NotACall(Exception):
    """The text is not a call of a tool that was offered; nothing of it was reported."""


_SPACE = " \t\r\n"
_NAME, _ARGUMENTS = "name", ("arguments", "parameters")


class ValueReader:
    """Finds the end of one JSON value, a character at a time. Only as strict as that needs."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = False
        self._is_escaped = False
        self.is_done = False
        """After the last character of an object, an array or a string. Other values end with what follows them."""

    def push(self, character: str) -> None:
        """Add a character."""
        if self._in_string:
            if self._is_escaped:
                self._is_escaped = False
            elif character == "\\":
                self._is_escaped = True
            elif character == '"':
                self._in_string = False
                self.is_done = not self._depth
        elif character == '"':
            self._in_string = True
        elif character in "{[":
            self._depth += 1
        elif character in "}]":
            self._depth -= 1
            self.is_done = self._depth <= 0

    @property
    def is_inside(self) -> bool:
        """Whether the value is an object, an array or a string and not done."""
        return self._depth > 0 or self._in_string


class CallReader:
    """Reads ``{"name": ..., "arguments": {...}}`` a character at a time, its members in any order.

    The name is reported once it is known, the arguments from then on as they come.
    """

    def __init__(self, names: AbstractSet[str], events: Events) -> None:
        self.text = ""
        """All of it so far"""
        self.is_done = False
        self.is_reported = False
        """Whether its name has been"""
        self._names = names
        self._events = events
        self._state: Callable[[str], None] = self._before
        self._key = ""
        self._value = ""
        self._reader = ValueReader()
        self._arguments = ""
        """Held back for want of a name"""
        self._has_arguments = False

    def push(self, character: str) -> None:
        """Add a character. Raises ``NotACall`` if it is none, unless the name has been reported."""
        self.text += character
        try:
            self._state(character)
            if self.is_done:
                self._end()
        except (ValueError, NotACall):
            if not self.is_reported:
                raise NotACall from None
            self.is_done = True  # all there is to say of it has been said

    def _before(self, character: str) -> None:
        if character == "{":
            self._state = self._before_key
        elif character not in _SPACE:
            raise NotACall

    def _before_key(self, character: str) -> None:
        if character == '"':
            self._value, self._state = '"', self._in_key
            self._reader = ValueReader()
            self._reader.push(character)
        elif character == "}":
            self.is_done = True
        elif character not in _SPACE:
            raise NotACall

    def _in_key(self, character: str) -> None:
        self._value += character
        self._reader.push(character)
        if self._reader.is_done:
            self._key, self._state = json.loads(self._value), self._before_colon

    def _before_colon(self, character: str) -> None:
        if character == ":":
            self._state = self._before_value
        elif character not in _SPACE:
            raise NotACall

    def _before_value(self, character: str) -> None:
        if character not in _SPACE:
            self._value, self._reader, self._state = "", ValueReader(), self._in_value
            self._in_value(character)

    def _in_value(self, character: str) -> None:
        if self._value and not self._reader.is_inside and character in _SPACE + ",}":
            self._end_value()
            self._after_value(character)
            return
        self._value += character
        self._reader.push(character)
        if self._takes_arguments and self._value[0] == "{":
            self._take(character)
        if self._reader.is_done:
            self._end_value()

    def _end_value(self) -> None:
        self._state = self._after_value
        if self._key == _NAME and not self.is_reported:
            name = json.loads(self._value)
            if not isinstance(name, str) or name not in self._names:
                raise NotACall
            self.is_reported = True
            self._events.begin(name)
            self._events.arguments(self._arguments)
        elif self._takes_arguments and self._value[0] == "{":
            self._has_arguments = True
        elif self._takes_arguments:
            # Some models write the arguments as a text that holds the object, or null for none.
            value = json.loads(self._value)
            if value is not None:
                if not isinstance(value, str) or not isinstance(json.loads(value), dict):
                    raise NotACall
                self._take(value)
                self._has_arguments = True

    @property
    def _takes_arguments(self) -> bool:
        """Whether the value at hand is the arguments; the first that comes counts."""
        return self._key in _ARGUMENTS and not self._has_arguments

    def _after_value(self, character: str) -> None:
        if character == ",":
            self._state = self._before_key
        elif character == "}":
            self.is_done = True
        elif character not in _SPACE:
            raise NotACall

    def _take(self, text: str) -> None:
        if self.is_reported:
            self._events.arguments(text)
        else:
            self._arguments += text

    def _end(self) -> None:
        if not self.is_reported:
            raise NotACall
        if not self._has_arguments:
            self._events.arguments("{}")
