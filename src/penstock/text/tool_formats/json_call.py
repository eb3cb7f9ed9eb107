"""Reading one call, or one value, that is written as JSON."""

import json
from collections.abc import Callable
from collections.abc import Set as AbstractSet

from penstock.text.tool_formats.base import Events


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
