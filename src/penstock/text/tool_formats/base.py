"""What the formats share: tools, events, rules, and a parser's frame."""

import json
import secrets
import string
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
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

    def parser(self, tools: Sequence[Tool], most_calls: int | None) -> ToolParser:
        """Return a parser for one answer. A call of what is not among ``tools`` is content."""

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


class HoldingParser(ABC):
    """A ``ToolParser`` that holds text back until it knows what it is."""

    def __init__(self, most_calls: int | None) -> None:
        self._events = Events(most_calls)
        self._rest = ""
        """Not read yet"""

    def push(self, text: str) -> list[Event]:
        """Add text; return what is now certain."""
        self._rest += text
        self._read(is_final=False)
        return self._events.take()

    def finish(self) -> list[Event]:
        """Return what was held back, when nothing can follow."""
        self._read(is_final=True)
        self._events.content(self._unfinished())
        self._events.finish()
        return self._events.take()

    @abstractmethod
    def _read(self, *, is_final: bool) -> None:
        """Read as much of the rest as is certain, which is all if it ``is_final``."""

    @abstractmethod
    def _unfinished(self) -> str:
        """Return what was read and nothing was said of, at the end."""
