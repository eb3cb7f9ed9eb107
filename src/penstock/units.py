"""Numbers as people read them. Inside the project everything is seconds, bytes and tokens."""


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
