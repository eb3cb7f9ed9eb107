"""Hermes, Qwen 2.5 and 3: text, and calls as JSON, each between ``<tool_call>`` and ``</tool_call>``."""

from collections.abc import Sequence
from collections.abc import Set as AbstractSet

from penstock.text.markers import at_mark, find_mark
from penstock.text.tool_formats.base import (
    HoldingParser,
    Spelling,
    Tool,
    call_rules,
    long_call_id,
)
from penstock.text.tool_formats.json_call import CallReader, NotACall
from penstock.text.tool_formats.tags import CLOSE, OPEN, forced_between_tags, offered_between_tags


class Hermes:
    """See the module."""

    name = "hermes"
    marks: tuple[str, ...] = (OPEN, CLOSE)
    commits = True

    def recognizes(self, template: str) -> bool:
        """Whether a chat template teaches this format; ``<function=`` is another one between the same marks."""
        return OPEN in template and "<function=" not in template

    def parser(self, tools: Sequence[Tool], most_calls: int | None) -> "HermesParser":
        """Return a parser for one answer."""
        return HermesParser(frozenset(tool.name for tool in tools), most_calls)

    def forced(self, tools: Sequence[Tool], spelling: Spelling, *, is_parallel: bool) -> str:
        """Return rules for calls and nothing else."""
        return forced_between_tags(call_rules(tools, "arguments"), spelling, is_parallel=is_parallel)

    def offered(self, tools: Sequence[Tool], spelling: Spelling, *, is_parallel: bool) -> str:
        """Return rules for text in which the opening tag commits to a call."""
        return offered_between_tags(call_rules(tools, "arguments"), spelling, is_parallel=is_parallel)

    def call_id(self) -> str:
        """Return an id such as OpenAI's."""
        return long_call_id()


class HermesParser(HoldingParser):
    """See ``ToolParser``."""

    def __init__(self, names: AbstractSet[str], most_calls: int | None) -> None:
        super().__init__(most_calls)
        self._names = names
        self._call: CallReader | None = None

    def _read(self, *, is_final: bool) -> None:
        while self._rest:
            if self._call is None:
                before, after = find_mark(self._rest, OPEN, is_final=is_final)
                self._events.content(before)
                if after is None:
                    self._rest = self._rest[len(before) :]
                    return
                self._rest, self._call = after, CallReader(self._names, self._events)
            elif not self._call.is_done:
                self._read_call(self._call)
            else:
                rest = self._rest.lstrip()
                closes = at_mark(rest, CLOSE)
                if closes is None and not is_final:
                    return
                # Whatever else follows a whole call is content.
                self._rest = rest[len(CLOSE) :] if closes else "" if closes is None else self._rest
                self._call = None

    def _read_call(self, call: CallReader) -> None:
        for position, character in enumerate(self._rest, start=1):
            try:
                call.push(character)
            except NotACall:
                self._events.content(OPEN + call.text)
                self._rest, self._call = self._rest[position:], None
                return
            if call.is_done:
                self._rest = self._rest[position:]
                return
        self._rest = ""

    def _unfinished(self) -> str:
        return OPEN + self._call.text if self._call is not None and not self._call.is_reported else ""
