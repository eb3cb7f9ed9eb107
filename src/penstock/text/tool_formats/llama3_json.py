"""Llama 3.1 and later: an answer that is calls as JSON objects, separated by semicolons, or else is text."""

from collections.abc import Sequence
from collections.abc import Set as AbstractSet

from penstock.text.markers import at_mark
from penstock.text.tool_formats.base import (
    HoldingParser,
    Spelling,
    Tool,
    call_rules,
    long_call_id,
)
from penstock.text.tool_formats.json_call import CallReader, NotACall

_TAG = "<|python_tag|>"


class Llama3JSON:
    """See the module."""

    name = "llama3_json"
    marks: tuple[str, ...] = (_TAG,)
    commits = False

    def recognizes(self, template: str) -> bool:
        """Whether a chat template teaches this format."""
        return _TAG in template or ('"parameters": dictionary' in template and "<|eot_id|>" in template)

    def parser(self, tools: Sequence[Tool], most_calls: int | None) -> "Llama3JSONParser":
        """Return a parser for one answer."""
        return Llama3JSONParser(frozenset(tool.name for tool in tools), most_calls)

    def forced(self, tools: Sequence[Tool], spelling: Spelling, *, is_parallel: bool) -> str:
        """Return rules for calls and nothing else."""
        more = ' ("; " call)*' if is_parallel else ""
        return f"answer: call{more}\n{call_rules(tools, 'parameters')}\n"

    def offered(self, tools: Sequence[Tool], spelling: Spelling, *, is_parallel: bool) -> str:
        """Return rules for calls, or text that does not begin with a brace."""
        calls = self.forced(tools, spelling, is_parallel=is_parallel).removeprefix("answer")
        return f"answer: calls | /([^{{](?s:.*))?/\ncalls{calls}"

    def call_id(self) -> str:
        """Return an id such as OpenAI's."""
        return long_call_id()


class Llama3JSONParser(HoldingParser):
    """See ``ToolParser``."""

    def __init__(self, names: AbstractSet[str], most_calls: int | None) -> None:
        super().__init__(most_calls)
        self._names = names
        self._before = ""
        """What stands before the next call, for the case that none follows"""
        self._has_calls = False
        self._call: CallReader | None = None
        self._is_text = False

    def _read(self, *, is_final: bool) -> None:
        while self._rest:
            if self._is_text:
                self._events.content(self._rest)
                self._rest = ""
            elif self._call is None:
                if not self._read_between(is_final=is_final):
                    return
            else:
                self._read_call(self._call)

    def _read_between(self, *, is_final: bool) -> bool:
        """Go on to the next call, or to text; False if more is needed to tell."""
        first = self._rest[0]
        if first.isspace() or (first == ";" and self._has_calls):
            self._before += first
            self._rest = self._rest[1:]
        elif first == "{":
            self._call = CallReader(self._names, self._events)
        else:
            is_tag = at_mark(self._rest, _TAG)
            if is_tag is None and not is_final:
                return False
            if is_tag:
                self._before += _TAG
                self._rest = self._rest[len(_TAG) :]
            else:
                self._end_calls()
        return True

    def _read_call(self, call: CallReader) -> None:
        for position, character in enumerate(self._rest, start=1):
            try:
                call.push(character)
            except NotACall:
                self._rest = call.text + self._rest[position:]
                self._end_calls()
                return
            if call.is_done:
                self._rest, self._before, self._call = self._rest[position:], "", None
                self._has_calls = True
                return
        self._rest = ""

    def _end_calls(self) -> None:
        """Take all that follows the last call as text."""
        self._rest, self._before, self._call, self._is_text = self._before + self._rest, "", None, True

    def _unfinished(self) -> str:
        if self._call is not None:
            return "" if self._call.is_reported else self._before + self._call.text
        return "" if self._has_calls else self._before
