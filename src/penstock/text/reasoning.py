"""Tell a model's reasoning, between ``<think>`` and ``</think>`` at the beginning, from its answer."""

from penstock.text.markers import at_mark, find_mark

OPEN, CLOSE = "<think>", "</think>"


class ReasoningSplitter:
    """Splits text that arrives in pieces. The result does not depend on where it was cut.

    White space at either end of the reasoning, and before the answer that follows it, belongs to neither.
    """

    def __init__(self, *, is_open: bool) -> None:
        """``is_open`` says that the prompt ends with the opening mark already."""
        self._state = "inside" if is_open else "before"
        self._rest = ""
        self._space: str | None = None
        """White space that may yet turn out to be inside the reasoning; None before its first word."""

    @property
    def is_inside(self) -> bool:
        """Whether what comes next is reasoning, as far as is known."""
        return self._state == "inside"

    def push(self, text: str) -> tuple[str, str]:
        """Add text; return the reasoning and the answer that are now certain."""
        return self._split(text, is_final=False)

    def finish(self) -> tuple[str, str]:
        """Return what was held back, when nothing can follow."""
        return self._split("", is_final=True)

    def _split(self, text: str, *, is_final: bool) -> tuple[str, str]:
        self._rest += text
        if self._state == "before":
            opens = at_mark(self._rest.lstrip(), OPEN)
            if opens is None and not is_final:
                return "", ""
            if opens:
                self._rest = self._rest.lstrip()[len(OPEN) :]
            self._state = "inside" if opens else "answer"
        reasoning = ""
        if self._state == "inside":
            before, after = find_mark(self._rest, CLOSE, is_final=is_final)
            reasoning = self._trimmed(before)
            if after is None:
                self._rest = self._rest[len(before) :]
                return reasoning, ""
            self._state, self._rest = "trimming", after
        if self._state == "trimming":
            self._rest = self._rest.lstrip()
            if self._rest:
                self._state = "answer"
        answer, self._rest = self._rest, ""
        return reasoning, answer

    def _trimmed(self, text: str) -> str:
        if self._space is None:
            text = text.lstrip()
            if not text:
                return ""
        whole = (self._space or "") + text
        words = whole.rstrip()
        self._space = whole[len(words) :]
        return words
