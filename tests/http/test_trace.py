"""A caller's trace is continued where it is valid and forgotten where it is not."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.http.trace import continue_trace

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
SPAN = "00f067aa0ba902b7"
HEADER = re.compile(r"00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-0[0-3]")


@pytest.mark.parametrize(
    ("header", "flags"),
    [
        (f"00-{TRACE}-{SPAN}-00", "00"),
        (f"00-{TRACE}-{SPAN}-01", "01"),
        (f"00-{TRACE}-{SPAN}-03", "03"),
        # Flags nobody has defined must not be passed on.
        (f"00-{TRACE}-{SPAN}-ff", "03"),
        (f" 00-{TRACE}-{SPAN}-01\t", "01"),
        # A version to come is read as far as it is known, and answered in ours.
        (f"cc-{TRACE}-{SPAN}-01", "01"),
        (f"cc-{TRACE}-{SPAN}-01-what-the-future-brings", "01"),
    ],
)
def test_a_valid_trace_goes_on_with_a_span_of_its_own(header: str, flags: str) -> None:
    trace = continue_trace([header])
    assert trace is not None
    assert (trace.trace_id, trace.parent_id) == (TRACE, SPAN)
    assert trace.traceparent == f"00-{TRACE}-{trace.span_id}-{flags}"
    assert HEADER.fullmatch(trace.traceparent)
    other = continue_trace([header])
    assert other is not None
    assert other.span_id != trace.span_id


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [""],
        ["nonsense"],
        [f"00-{'0' * 32}-{SPAN}-01"],
        [f"00-{TRACE}-{'0' * 16}-01"],
        [f"00-{TRACE.upper()}-{SPAN}-01"],
        [f"ff-{TRACE}-{SPAN}-01"],
        [f"00-{TRACE}-{SPAN}-01-more"],
        [f"cc-{TRACE}-{SPAN}-01more"],
        [f"00-{TRACE}-{SPAN}"],
        [f"00-{TRACE}-{SPAN}-1"],
        [f"00-{TRACE[:-1]}-{SPAN}-01"],
        [f"0-{TRACE}-{SPAN}-01"],
        [f"00-{TRACE}-{SPAN}-01\n"],
        [f"00-{TRACE}-{SPAN}-0\u0661"],
        [f"00-{TRACE}-{SPAN}-01"] * 2,
    ],
)
def test_a_broken_trace_is_none(headers: list[str]) -> None:
    assert continue_trace(headers) is None


@given(
    st.lists(st.text(max_size=70) | st.from_regex(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}.*"), max_size=2)
)
def test_nothing_breaks_it_and_nothing_foreign_leaves_it(headers: list[str]) -> None:
    trace = continue_trace(headers)
    if trace is not None:
        assert HEADER.fullmatch(trace.traceparent)
