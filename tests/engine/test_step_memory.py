"""A step of decoding works in memory that is there already, and holds on to its tokens alone."""

import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from penstock.engine.engine import Engine
from tests.engines import build_engine, greedy
from tests.kernels.backends import needs_native

NUM_REQUESTS, NUM_STEPS = 8, 40


def decoding(path: Path) -> Engine:
    """Return an engine whose requests all decode, and will for as long as is looked at."""
    engine = build_engine(path, num_blocks=1024)
    for i in range(NUM_REQUESTS):
        engine.add(greedy(str(i), [5 + i] * 9, max_tokens=100))
    for _ in range(3):
        engine.step()
    return engine


class Noting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes what torch does but look at tensors in other shapes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.done: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            self.done.append(str(func))
        return func(*args, **(kwargs or {}))


@needs_native
def test_torch_does_nothing(checkpoint: Callable[[str], Path]) -> None:
    engine = decoding(checkpoint("llama"))
    with Noting() as noting:
        for _ in range(3):
            engine.step()
    assert noting.done == []


def test_what_a_step_makes_goes_with_it(checkpoint: Callable[[str], Path]) -> None:
    engine = decoding(checkpoint("llama"))
    tracemalloc.start()
    try:
        engine.step()
        before, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        for _ in range(NUM_STEPS):
            engine.step()
        after, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # A token is an integer of 32 bytes and three places in lists, which grow ahead; every fourth takes a block.
    assert after - before < NUM_REQUESTS * NUM_STEPS * 150
    assert peak - after < 64 << 10
