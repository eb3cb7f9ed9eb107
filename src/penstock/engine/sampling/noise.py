"""Randomness that belongs to a request: a function of its seed and of how many tokens it has, of nothing else."""

_GOLDEN = 0x9E3779B97F4A7C15
_BITS = (1 << 64) - 1


def _mix(x: int) -> int:
    """SplitMix64's finalizer (Steele, Lea and Flood, OOPSLA 2014)."""
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & _BITS
    x = (x ^ x >> 27) * 0x94D049BB133111EB & _BITS
    return x ^ x >> 31


def stream_seed(seed: int, index: int) -> int:
    """Return the 64-bit seed of choice ``index`` of a request with ``seed``, any integer."""
    return _mix(_mix(seed + _GOLDEN & _BITS) + index * _GOLDEN & _BITS)


def uniform(seed: int, counter: int) -> float:
    """Return a number in [0, 1) for ``seed`` of 64 bits and ``counter``, with 53 random bits."""
    return (_mix(_mix(seed) + (counter + 1) * _GOLDEN & _BITS) >> 11) * 2.0**-53
