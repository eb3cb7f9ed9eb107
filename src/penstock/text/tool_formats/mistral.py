"""Mistral: text, then ``[TOOL_CALLS]`` and a JSON list of calls."""

from collections.abc import Sequence
from collections.abc import Set as AbstractSet

from penstock.text.markers import find_mark
from penstock.text.tool_formats.base import (
    HoldingParser,
    Spelling,
    Tool,
    any_until,
    call_rules,
    short_call_id,
)
from penstock.text.tool_formats.json_call import CallReader, NotACall

_TAG = "[TOOL_CALLS]"


class Mistral:
    """See the module. Templates with ``[ARGS]`` teach another format with the same mark."""

    name = "mistral"
    marks: tuple[str, ...] = (_TAG,)
    commits = True

    def recognizes(self, template: str) -> bool:
        """Whether a chat template teaches this format."""
        return _TAG in template and "[ARGS]" not in template

    def parser(self, tools: Sequence[Tool], most_calls: int | None) -> "MistralParser":
        """Return a parser for one answer."""
        return MistralParser(frozenset(tool.name for tool in tools), most_calls)

    def forced(self, tools: Sequence[Tool], spelling: Spelling, *, is_parallel: bool) -> str:
        """Return rules for calls and nothing else."""
        return f"answer: {spelling(_TAG)} list\n{_list_rules(tools, is_parallel=is_parallel)}"

    def offered(self, tools: Sequence[Tool], spelling: Spelling, *, is_parallel: bool) -> str:
        """Return rules for text in which the mark commits to calls, which end the answer."""
        opened = any_until("opened", spelling(_TAG))
        return f"answer: opened list | /(?s:.*)/\n{opened}\n{_list_rules(tools, is_parallel=is_parallel)}"

    def call_id(self) -> str:
        """Return nine letters and digits, the only ids that Mistral's templates take."""
        return short_call_id()


def _list_rules(tools: Sequence[Tool], *, is_parallel: bool) -> str:
    more = ' (", " call)*' if is_parallel else ""
    return f'list: / ?/ "[" call{more} "]"\n{call_rules(tools, "arguments")}\n'


class MistralParser(HoldingParser):
    """See ``ToolParser``."""

    def __init__(self, names: AbstractSet[str], most_calls: int | None) -> None:
        super().__init__(most_calls)
        self._names = names
        self._state = "text"
        self._before = ""
        """What stands before the next call of the list, for the case that none follows"""
        self._has_calls = False
        self._call: CallReader | None = None

    def _read(self, *, is_final: bool) -> None:
        while self._rest:
            if self._state == "text":
                before, after = find_mark(self._rest, _TAG, is_final=is_final)
                self._events.content(before)
                if after is None:
                    self._rest = self._rest[len(before) :]
                    return
                self._rest, self._before, self._state, self._has_calls = after, _TAG, "open", False
            elif self._call is not None:
                self._read_call(self._call)
            else:
                self._read_between()

    def _read_between(self) -> None:
        """Go on to the next call of the list, or to its end, or to text."""
        first = self._rest[0]
        if self._state == "list" and first == "{":
            self._call = CallReader(self._names, self._events)
            return
        if first.isspace() or first == ("[" if self._state == "open" else ","):
            self._state = "list" if first == "[" else self._state
            self._before += first
        elif self._state == "list" and self._has_calls and first == "]":
            self._state, self._before = "text", ""
        else:
            self._end_calls(self._before)
            return
        self._rest = self._rest[1:]

    def _read_call(self, call: CallReader) -> None:
        for position, character in enumerate(self._rest, start=1):
            try:
                call.push(character)
            except NotACall:
                self._rest = self._rest[position:]
                self._end_calls(self._before + call.text)
                return
            if call.is_done:
                self._rest, self._before, self._call = self._rest[position:], "", None
                self._has_calls = True
                return
        self._rest = ""

    def _end_calls(self, text: str) -> None:
        """Take ``text``, which is no list of calls, and all that follows it as text."""
        self._events.content(text)
        self._before, self._call, self._state = "", None, "text"

    def _unfinished(self) -> str:
        if self._call is not None:
            return "" if self._call.is_reported else self._before + self._call.text
        return "" if self._has_calls else self._before
