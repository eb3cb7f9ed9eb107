"""Decode attention over long contexts, in each dtype of the cache: `python -m benchmarks.attention`.

One sequence, one new token. Caches in float32, bfloat16 and int8 by turns, each as many layers as fill 256 MiB, so
that every call reads from memory, in blocks that lie in no order, as a server's are. The floor of a call is the bytes
of its keys, values and scales at the speed at which torch sums a large float32 tensor on the same threads, measured in
the same round. Medians of five rounds; a round's figure is the best of three.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import cycle

import numpy as np
import torch
from torch import Tensor

from penstock.kernels import Attention, BatchLayout, CPUOps, KVBlocks, use_threads
from tests.packing import layout_of

SHAPES = {
    "Qwen2.5-0.5B": (14, 2, 64),
    "Llama-3.2-1B": (32, 8, 64),
    "Qwen3-0.6B": (16, 8, 128),
    "OLMo-1B": (16, 16, 128),
}
"""Query heads, KV heads, head width"""
CONTEXTS = [1024, 4096, 16384]
DTYPES = [torch.float32, torch.bfloat16, torch.int8]
BLOCK_SIZE = 16
LEAST_BYTES = 256 << 20
ROUNDS = 5


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """Layers of one dtype's cache."""

    caches: list[KVBlocks]
    read_bytes: int
    """What one call reads"""


def zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return memory as the model's cache has it, all of it there."""
    num_bytes = int(np.prod(shape)) * dtype.itemsize
    tensor = torch.from_numpy(np.zeros(num_bytes, dtype=np.uint8)).view(dtype).view(shape)
    return tensor.fill_(1)


def contestant(shape: tuple[int, int, int], context: int, dtype: torch.dtype) -> Contestant:
    """Return enough layers of ``context`` tokens to read from memory."""
    _, G, D = shape
    shapes = CPUOps.cache_shapes(context // BLOCK_SIZE, BLOCK_SIZE, G, D)
    read_bytes = 2 * context * G * (D * dtype.itemsize + (4 if dtype is torch.int8 else 0))
    return Contestant(
        caches=[
            KVBlocks(
                zeros(shapes.k, dtype),
                zeros(shapes.v, dtype),
                zeros(shapes.scales, torch.float32) if dtype is torch.int8 else None,
                zeros(shapes.scales, torch.float32) if dtype is torch.int8 else None,
            )
            for _ in range(-(-LEAST_BYTES // read_bytes))
        ],
        read_bytes=read_bytes,
    )


def layout(context: int) -> BatchLayout:
    """Return one decoding sequence whose blocks lie in no order."""
    order = torch.randperm(context // BLOCK_SIZE, generator=torch.Generator().manual_seed(0))
    return layout_of([1], [context], [order.tolist()], BLOCK_SIZE)


def decode_once(attention: Attention, q: Tensor, next_cache: Callable[[], KVBlocks]) -> None:
    """Attend in the layer whose turn it is."""
    attention(q, next_cache(), scale=q.shape[-1] ** -0.5)


def best_s(work: Callable[[], object], num_calls: int) -> float:
    """Return the shortest of three averages over ``num_calls``."""
    times = []
    for _ in range(3):
        began = time.perf_counter()
        for _ in range(num_calls):
            work()
        times.append((time.perf_counter() - began) / num_calls)
    return min(times)


def main() -> None:
    """Print a row for each shape, context and dtype."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=3)
    parser.add_argument("--shape", choices=SHAPES, action="append")
    arguments = parser.parse_args()
    print("| shape | context | cache | us | GB/s | plain read, GB/s | times the floor | bfloat16 / this |")
    print("|---|---|---|---|---|---|---|---|")
    plain = zeros((LEAST_BYTES // 4,), torch.float32)
    for name in arguments.shape or SHAPES:
        H, G, D = SHAPES[name]
        for context in CONTEXTS:
            step, q = layout(context), torch.randn(1, H, D)
            use_threads(arguments.threads)
            attention = CPUOps.plan_attention(step, num_heads=H, num_kv_heads=G, head_dim=D, window=None)
            contestants = {dtype: contestant((H, G, D), context, dtype) for dtype in DTYPES}
            seconds: dict[torch.dtype, list[float]] = {dtype: [] for dtype in DTYPES}
            bytes_per_s = []
            for _ in range(ROUNDS):
                torch.set_num_threads(arguments.threads)
                bytes_per_s.append(LEAST_BYTES / best_s(plain.sum, 1))
                use_threads(arguments.threads)
                for dtype, one in contestants.items():
                    next_cache = cycle(one.caches).__next__
                    decode = partial(decode_once, attention, q, next_cache)
                    seconds[dtype].append(best_s(decode, max(1, len(one.caches) // 2)))
            for dtype, one in contestants.items():
                took = statistics.median(seconds[dtype])
                floors = [one.read_bytes / speed for speed in bytes_per_s]
                times_floor = statistics.median(a / b for a, b in zip(seconds[dtype], floors, strict=True))
                gain = statistics.median(a / b for a, b in zip(seconds[torch.bfloat16], seconds[dtype], strict=True))
                print(
                    f"| {name} | {context} | {str(dtype).removeprefix('torch.')} | {took * 1e6:.0f} | "
                    f"{one.read_bytes / took / 1e9:.1f} | {statistics.median(bytes_per_s) / 1e9:.1f} | "
                    f"{times_floor:.2f} | {gain:.2f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
