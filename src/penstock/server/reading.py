"""Reading an answer: what of it is reasoning, what is content and what calls tools."""

from dataclasses import dataclass

from penstock.text import Tokenizer
from penstock.text.reasoning import CLOSE, OPEN, ReasoningSplitter
from penstock.text.tool_formats import Content, Event, Tool, ToolFormat


@dataclass(frozen=True, slots=True)
class Reasoning:
    """The next piece of what the model thought before it answered."""

    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """How the answers to one request are to be read."""

    reasoning_is_open: bool | None = None
    """Whether the prompt ends inside the reasoning; None for a model that does not reason."""
    tool_format: ToolFormat | None = None
    tools: tuple[Tool, ...] = ()
    most_calls: int | None = None

    def call_id(self) -> str:
        """Return an id for a call that was found."""
        assert self.tool_format is not None, "only a format's parser finds calls"
        return self.tool_format.call_id()

    def needs_special_tokens(self, tokenizer: Tokenizer) -> bool:
        """Whether the engine must leave special tokens in the text, because the marks that are looked for are such."""
        marks = () if self.tool_format is None else self.tool_format.marks
        if self.reasoning_is_open is not None:
            marks = (*marks, OPEN, CLOSE)
        return any(tokenizer.special_token_id(mark) is not None for mark in marks)


class AnswerReader:
    """Reads one answer that arrives in pieces. The events' sum does not depend on where it was cut."""

    def __init__(self, reading: Reading) -> None:
        is_open, tool_format = reading.reasoning_is_open, reading.tool_format
        self._splitter = None if is_open is None else ReasoningSplitter(is_open=is_open)
        self._parser = None if tool_format is None else tool_format.parser(reading.tools, reading.most_calls)

    @property
    def is_reasoning(self) -> bool:
        """Whether the answer is still in its reasoning."""
        return self._splitter is not None and self._splitter.is_inside

    def push(self, text: str, *, is_last: bool) -> list[Event | Reasoning]:
        """Add text; return what is now certain, which is everything if nothing can follow."""
        events: list[Event | Reasoning] = []
        if self._splitter is not None:
            reasoning, text = self._splitter.push(text)
            if is_last:
                more_reasoning, more = self._splitter.finish()
                reasoning, text = reasoning + more_reasoning, text + more
            if reasoning:
                events.append(Reasoning(reasoning))
        if self._parser is None:
            if text:
                events.append(Content(text))
            return events
        events.extend(self._parser.push(text))
        if is_last:
            events.extend(self._parser.finish())
        return events
