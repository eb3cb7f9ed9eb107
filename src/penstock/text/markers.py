"""Marks such as ``<tool_call>`` in text that arrives in pieces."""


def find_mark(text: str, mark: str, *, is_final: bool) -> tuple[str, str | None]:
    """Split ``text`` at ``mark``: what comes before it, and what follows, None where there is no mark yet.

    Unless ``is_final``, what may be the beginning of a mark is neither: the first part is then shorter than ``text``.
    """
    position = text.find(mark)
    if position >= 0:
        return text[:position], text[position + len(mark) :]
    if is_final:
        return text, None
    for length in range(min(len(mark) - 1, len(text)), 0, -1):
        if mark.startswith(text[-length:]):
            return text[:-length], None
    return text, None


def at_mark(text: str, mark: str) -> bool | None:
    """Whether ``text`` begins with ``mark``; None while that cannot be said."""
    if text.startswith(mark):
        return True
    return None if mark.startswith(text) else False
