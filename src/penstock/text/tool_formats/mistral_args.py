"""Mistral since its tokenizer's version 11: text, then ``[TOOL_CALLS]name[ARGS]{...}`` for each call.

Version 11 writes an id between name and arguments, as in ``name[CALL_ID]123456789[ARGS]{...}``; it is left out.
"""

import json
from collections.abc import Sequence
from collections.abc import Set as AbstractSet

from penstock.text.markers import find_mark
from penstock.text.tool_formats.base import (
    HoldingParser,
    Spelling,
    Tool,
    any_until,
    argument_rules,
    short_call_id,
)
from penstock.text.tool_formats.json_call import ValueReader

_TAG, _ID, _ARGUMENTS = "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"
_MOST_HEAD_CHARS = 200
"""Of a name and an id; what is longer is no call."""


class MistralArgs:
    """See the module."""

    name = "mistral_args"
    marks: tuple[str, ...] = (_TAG, _ID, _ARGUMENTS)
    commits = True

    def recognizes(self, template: str) -> bool:
        """Whether a chat template teaches this format."""
        return _TAG in template and _ARGUMENTS in template

    def parser(self, tools: Sequence[Tool], most_calls: int | None) -> "MistralArgsParser":
        """Return a parser for one answer."""
        return MistralArgsParser(frozenset(tool.name for tool in tools), most_calls)

    def forced(self, tools: Sequence[Tool], spelling: Spelling, *, is_parallel: bool) -> str:
        """Return rules for calls and nothing else."""
        tag = spelling(_TAG)
        more = f" ({tag} call)*" if is_parallel else ""
        return f"answer: {tag} call{more}\n{_call_rules(tools, spelling)}"

    def offered(self, tools: Sequence[Tool], spelling: Spelling, *, is_parallel: bool) -> str:
        """Return rules for text in which the mark commits to calls, which end the answer."""
        tag = spelling(_TAG)
        more = f" ({tag} call)*" if is_parallel else ""
        opened = any_until("opened", tag)
        return f"answer: opened call{more} | /(?s:.*)/\n{opened}\n{_call_rules(tools, spelling)}"

    def call_id(self) -> str:
        """Return nine letters and digits, the only ids that Mistral's templates take."""
        return short_call_id()


def _call_rules(tools: Sequence[Tool], spelling: Spelling) -> str:
    rules = ["call: " + " | ".join(f"call_{i}" for i in range(len(tools)))]
    rules += [f"call_{i}: {json.dumps(tool.name)} {spelling(_ARGUMENTS)} arguments_{i}" for i, tool in enumerate(tools)]
    return "\n".join([*rules, argument_rules(tools)]) + "\n"


class MistralArgsParser(HoldingParser):
    """See ``ToolParser``."""

    def __init__(self, names: AbstractSet[str], most_calls: int | None) -> None:
        super().__init__(most_calls)
        self._names = names
        self._head: str | None = None
        """What stands before the arguments, from the mark on; None in text"""
        self._name: str | None = None
        self._arguments: ValueReader | None = None

    def _read(self, *, is_final: bool) -> None:
        while self._rest:
            if self._arguments is not None:
                self._read_arguments(self._arguments)
            elif self._head is None:
                before, after = find_mark(self._rest, _TAG, is_final=is_final)
                self._events.content(before)
                if after is None:
                    self._rest = self._rest[len(before) :]
                    return
                self._rest, self._head = after, _TAG
            elif self._name is not None:
                self._read_opening(self._head, self._name)
            else:
                head, after = find_mark(self._rest, _ARGUMENTS, is_final=True)
                if after is None and len(head) <= _MOST_HEAD_CHARS and not is_final:
                    return
                name = head.split(_ID)[0].strip()
                if after is None or name not in self._names:
                    self._end_head(self._head)
                else:
                    self._name, self._head, self._rest = name, _TAG + head + _ARGUMENTS, after

    def _read_opening(self, head: str, name: str) -> None:
        first = self._rest[0]
        if first == "{":
            self._events.begin(name)
            self._arguments = ValueReader()
        elif first.isspace() and len(head) <= 2 * _MOST_HEAD_CHARS:
            self._head, self._rest = head + first, self._rest[1:]
        else:
            self._end_head(head)

    def _read_arguments(self, reader: ValueReader) -> None:
        for position, character in enumerate(self._rest, start=1):
            reader.push(character)
            if reader.is_done:
                self._events.arguments(self._rest[:position])
                self._rest = self._rest[position:]
                self._head = self._name = self._arguments = None
                return
        self._events.arguments(self._rest)
        self._rest = ""

    def _end_head(self, head: str) -> None:
        """Take the mark and what follows it, which are no call, as text."""
        self._events.content(head)
        self._head = self._name = None

    def _unfinished(self) -> str:
        return self._head or "" if self._arguments is None else ""
