"""Calls on lines of their own between ``<tool_call>`` and ``</tool_call>``: what the formats with these marks share."""

from penstock.text.tool_formats.base import Spelling, any_until

OPEN, CLOSE = "<tool_call>", "</tool_call>"


def forced_between_tags(call: str, spelling: Spelling, *, is_parallel: bool) -> str:
    """Return rules for calls and nothing else. ``call`` holds the rules of ``call``, which is what a pair surrounds."""
    more = r' ("\n" marked)*' if is_parallel else ""
    return f"answer: marked{more}\nmarked: {spelling(OPEN)} body\n{_body(call, spelling)}"


def offered_between_tags(call: str, spelling: Spelling, *, is_parallel: bool) -> str:
    """Return rules for text in which the opening tag commits to a call."""
    many = "*" if is_parallel else "?"
    opened = any_until("opened", spelling(OPEN))
    return f"answer: (opened body){many} /(?s:.*)/\n{opened}\n{_body(call, spelling)}"


def _body(call: str, spelling: Spelling) -> str:
    return f'body: "\\n" call "\\n" {spelling(CLOSE)}\n{call}\n'
