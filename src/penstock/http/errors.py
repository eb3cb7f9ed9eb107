"""The one table from errors to HTTP, and the bodies that OpenAI's and Anthropic's clients expect."""

import math
from typing import Any

from penstock.errors import (
    ContextTooLong,
    DeadlineUnmeetable,
    ModelNotFound,
    OverLimit,
    PenstockError,
    RequestError,
    UnavailableError,
)

# (status, type), most specific class first.
_TABLE: tuple[tuple[type[PenstockError], int, str], ...] = (
    (ModelNotFound, 404, "invalid_request_error"),
    (OverLimit, 413, "invalid_request_error"),
    (ContextTooLong, 400, "invalid_request_error"),
    (RequestError, 400, "invalid_request_error"),
    (DeadlineUnmeetable, 504, "timeout_error"),
    (UnavailableError, 503, "service_unavailable_error"),
    (PenstockError, 500, "internal_error"),
)

CLIENT_LEFT = 499
"""What the log says of a request whose client did not wait; nobody receives it."""


_ANTHROPIC_TYPES = {
    404: "not_found_error",
    413: "request_too_large",
    500: "api_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def status_of(error: PenstockError) -> int:
    """Return the HTTP status of an error."""
    return next(status for kind, status, _ in _TABLE if isinstance(error, kind))


def error_body(error: PenstockError) -> dict[str, Any]:
    """Return the JSON body of an error."""
    kind = next(name for cls, _, name in _TABLE if isinstance(error, cls))
    return body(error.message, kind=kind, param=error.param, code=error.code)


def body(message: str, *, kind: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """Return OpenAI's error object."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def is_anthropics(path: str) -> bool:
    """Whether a path is one of Anthropic's API, whose clients expect its own errors."""
    return path == "/v1/messages" or path.startswith("/v1/messages/")


def anthropic_body(message: str, status: int) -> dict[str, Any]:
    """Return Anthropic's error object."""
    kind = _ANTHROPIC_TYPES.get(status, "invalid_request_error")
    return {"type": "error", "error": {"type": kind, "message": message}}


def error_body_at(path: str, error: PenstockError) -> dict[str, Any]:
    """Return the JSON body of an error as clients of ``path`` expect it."""
    return anthropic_body(error.message, status_of(error)) if is_anthropics(path) else error_body(error)


def error_headers(error: PenstockError) -> dict[str, str]:
    """Return ``retry-after`` in whole seconds where waiting helps."""
    if error.retry_after_s is None:
        return {}
    return {"retry-after": str(max(1, math.ceil(error.retry_after_s)))}
