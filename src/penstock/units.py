"""Numbers as people read and write them. Inside the project everything is seconds, bytes and tokens."""

import re

_AMOUNT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-zµ]*)\s*", re.IGNORECASE)

_PERCENT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*%\s*")

_BYTE_UNITS = {
    "": 1,
    "b": 1,
    **{f"{prefix}b": 1000**power for power, prefix in enumerate("kmgt", start=1)},
    **{f"{prefix}ib": 1024**power for power, prefix in enumerate("kmgt", start=1)},
}

_SECOND_UNITS = {"": 1.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "m": 60.0, "min": 60.0, "h": 3600.0}


def parse_bytes(text: str) -> int:
    """Return the bytes that ``text`` names: ``2GiB``, ``500 MB``, ``4096``. Raises ValueError for other text."""
    match = _AMOUNT.fullmatch(text)
    if match is None or match[2].lower() not in _BYTE_UNITS:
        raise ValueError(f"{text!r} is not a size; write bytes or use KiB, MiB, GiB, TiB, kB, MB, GB, TB")
    return int(float(match[1]) * _BYTE_UNITS[match[2].lower()])


def parse_share(text: str) -> float:
    """Return the share that ``text`` names in percent: ``1%``, ``0.5 %``. Raises ValueError for other text."""
    match = _PERCENT.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not a percentage; write one such as 1%")
    return float(match[1]) / 100


def parse_duration(text: str) -> float:
    """Return the seconds that ``text`` names: ``100ms``, ``1.5s``, ``2min``. Raises ValueError for other text."""
    match = _AMOUNT.fullmatch(text)
    if match is None or match[2].lower() not in _SECOND_UNITS:
        raise ValueError(f"{text!r} is not a duration; write seconds or use us, ms, s, min, h")
    return float(match[1]) * _SECOND_UNITS[match[2].lower()]


def counted(number: int, noun: str) -> str:
    """Return how many of ``noun`` there are: ``1 step``, ``2,000 steps``."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def format_bytes(num_bytes: float) -> str:
    """Return ``num_bytes`` in the largest binary unit that keeps it at or above one: ``12.3 MiB``."""
    value = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def format_duration(seconds: float) -> str:
    """Return ``seconds`` with three significant digits in the unit that fits: ``850 µs``, ``3.2 s``."""
    if abs(seconds) < 1e-3:
        return f"{seconds * 1e6:.3g} µs"
    if abs(seconds) < 1:
        return f"{seconds * 1e3:.3g} ms"
    if abs(seconds) < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.1f} min"
