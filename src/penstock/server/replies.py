"""What routes reply: JSON, and what the description says of errors."""

from typing import Any

import msgspec
from starlette.responses import Response

from penstock.server.schemas import ErrorResponse

ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorResponse, "description": description}
    for status, description in {
        400: "The request is wrong; `param` names where.",
        404: "No such model.",
        413: "The request is too large.",
        500: "The engine failed under this request.",
        503: "Not ready, full or shutting down; `Retry-After` says when to try again.",
        504: "The deadline cannot be met.",
    }.items()
}
"""For a route's ``responses``"""


def json_response(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Return ``content``, plain data or protocol structs, as JSON."""
    return Response(msgspec.json.encode(content), status, headers, media_type="application/json")
