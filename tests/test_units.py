"""Amounts written by people are read, and nothing else is."""

import pytest

from penstock.units import counted, format_bytes, format_duration, parse_bytes, parse_duration, parse_share


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [("4096", 4096), ("2GiB", 2**31), ("500 MB", 500_000_000), ("1.5kib", 1536), ("1tib", 2**40), ("7 b", 7)],
)
def test_sizes(text: str, num_bytes: int) -> None:
    assert parse_bytes(text) == num_bytes


@pytest.mark.parametrize("text", ["", "much", "-3", "1e3", "2 boxes", "1,5GiB", "GiB"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="not a size"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("100ms", 0.1), ("1.5s", 1.5), ("2", 2.0), ("2min", 120.0), ("3h", 10800.0), ("5us", 5e-6)],
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "soon", "-1s", "1 fortnight"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(ValueError, match="not a duration"):
        parse_duration(text)


def test_printing() -> None:
    assert format_bytes(12.3 * 1024**2) == "12.3 MiB"
    assert format_duration(0.00085) == "850 µs"


def test_percentages() -> None:
    assert [parse_share(text) for text in ("1%", " 0.5 % ", "100%")] == [0.01, 0.005, 1]
    for text in ("1", "0.01", "%", "-1%", "1%%", "1 kB%"):
        with pytest.raises(ValueError, match="not a percentage"):
            parse_share(text)


def test_counts() -> None:
    assert [counted(number, "step") for number in (0, 1, 2000)] == ["0 steps", "1 step", "2,000 steps"]
