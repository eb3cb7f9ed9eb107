"""A caller's trace, continued: W3C Trace Context, level 2, header ``traceparent``."""

import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

# Section 3.2: version, trace id, parent id, flags, in lower case; ids of zeros and version ff are invalid. A version
# to come may add fields behind them.
_TRACEPARENT = re.compile(
    r"(?!ff)([0-9a-f]{2})-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(-.*)?", re.DOTALL
)
_KNOWN_FLAGS = 0b11
"""Sampled, and random trace id; the others must be sent as zero."""


@dataclass(frozen=True, slots=True)
class Trace:
    """This server's part of a trace."""

    trace_id: str
    """The caller's: 32 hexadecimal digits."""
    parent_id: str
    """The caller's span: 16 hexadecimal digits."""
    span_id: str
    """This request's own span."""
    flags: int

    @property
    def traceparent(self) -> str:
        """The header for whoever is told of this span."""
        return f"00-{self.trace_id}-{self.span_id}-{self.flags:02x}"


def continue_trace(traceparents: Sequence[str]) -> Trace | None:
    """Return the trace that a request's ``traceparent`` headers begin; None unless there is exactly one, and valid.

    Never raises: a trace that is broken is the tracer's problem, not the request's.
    """
    if len(traceparents) != 1:
        return None
    parts = _TRACEPARENT.fullmatch(traceparents[0].strip(" \t"))
    if parts is None or (parts[1] == "00" and parts[5] is not None):
        return None
    return Trace(parts[2], parts[3], secrets.token_hex(8), int(parts[4], 16) & _KNOWN_FLAGS)
