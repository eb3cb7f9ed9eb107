"""What is wrong with a body, in words for whoever sent it."""

import json
from collections.abc import Sequence
from typing import Any

from penstock.errors import InvalidRequest
from penstock.server.schemas import LATER, RENAMED

_MOST_NAME_CHARS = 128
_MOST_VALUE_CHARS = 60


def explain(problems: Sequence[Any], body: Any) -> InvalidRequest:
    """Return pydantic's first complaint in words that name the parameter, the value seen and what it may be."""
    # A union reports each of its members; the deepest complaint is about the one that was meant.
    problem = max(problems, key=lambda one: len(_path(one, body)))
    path = _path(problem, body)
    # Names are the caller's: they may be of any length, and hold what no encoding can.
    param = ".".join(path).encode(errors="backslashreplace").decode()[:_MOST_NAME_CHARS] or None
    kind, message = problem["type"], problem["msg"]
    if kind == "json_invalid":
        return InvalidRequest(f"the body is not valid JSON: {problem.get('ctx', {}).get('error', message)}")
    if kind == "extra_forbidden" and path[-1:] and path[-1] in LATER:
        return InvalidRequest(f"{param} is not supported yet; leave it out", param=param)
    if kind == "extra_forbidden" and path[-1:] and path[-1] in RENAMED:
        return InvalidRequest(f"{param} is called {RENAMED[path[-1]]} now; send it as that", param=param)
    if kind == "extra_forbidden":
        return InvalidRequest(f"unknown parameter {param!r}; leave it out", param=param)
    if kind == "missing":
        return InvalidRequest(f"{param or 'the body'} is missing", param=param)
    if kind in ("model_attributes_type", "model_type"):
        sent = f"{param} must be a JSON object" if param else "the body must be a JSON object, sent as application/json"
        return InvalidRequest(sent, param=param)
    where = "the body" if param is None else param
    value = problem.get("input")
    if param is not None and (value is None or isinstance(value, str | int | float)):
        where = f"{where} is {_shown(value)}"
    return InvalidRequest(f"{where}: {message[:1].lower()}{message[1:]}", param=param)


def _path(problem: Any, body: Any) -> list[str]:
    """Return where in ``body`` a complaint is, without the names of types that pydantic puts in between."""
    path = []
    places = problem["loc"][1:]
    for i, place in enumerate(places):
        is_item = isinstance(place, int) and isinstance(body, list) and place < len(body)
        if is_item or (isinstance(body, dict) and place in body):
            body = body[place]
        elif problem["type"] != "missing" or i < len(places) - 1:
            continue
        path.append(str(place))
    return path


def _shown(value: str | float | None) -> str:
    """Return a value as its sender wrote it, if it is short."""
    if isinstance(value, str) and len(value) > _MOST_VALUE_CHARS:
        return f"a text of {len(value)} characters"
    text = json.dumps(value)
    return text if len(text) <= _MOST_VALUE_CHARS else f"{text[:_MOST_VALUE_CHARS]}..."
