"""Products of one weight with 1 to 1024 rows, ours beside oneDNN's: `python -m benchmarks.linear`.

Both on the same threads and the same packed float32 weight, by turns, five rounds; each round's figure is the best of a
few, and the median over rounds is printed. Ratios above 1 mean ours is faster.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from penstock.kernels import QUANTIZATIONS, use_threads
from penstock.kernels.linear.cpu import PackedLinear

SIZES = [(512, 256), (1536, 256), (6144, 256), (2048, 768), (768, 2048), (4864, 896)]
"""(outputs, inputs): the demo model's, a 0.1B Llama's, Qwen2.5-0.5B's feed-forward"""
NUM_ROWS = [1, 2, 4, 8, 16, 32, 128, 1024]
ROUNDS = 5


def best_s(work: Callable[[], object], num_calls: int) -> float:
    """Return the shortest of three averages over ``num_calls``."""
    times = []
    for _ in range(3):
        began = time.perf_counter()
        for _ in range(num_calls):
            work()
        times.append((time.perf_counter() - began) / num_calls)
    return min(times)


def one_dnn(weight: Tensor) -> Callable[[Tensor], Tensor]:
    """Return oneDNN's product with a weight it packed."""
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, 64)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")


def main() -> None:
    """Print a row for each size and number of rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=3)
    threads = parser.parse_args().threads
    names = "oneDNN, us | float32, us | bfloat16, us | int8, us | int4, us"
    print(f"| N x K | rows | {names} | GFLOP/s, float32 | oneDNN / float32 |")
    print("|---|---|---|---|---|---|---|---|---|")
    torch.manual_seed(0)
    for N, K in SIZES:
        weight = torch.randn(N, K) / K**0.5
        use_threads(threads)
        contestants: dict[str, Callable[[Tensor], Tensor]] = {
            "oneDNN": one_dnn(weight),
            "float32": PackedLinear(weight, None),
            "bfloat16": PackedLinear(weight.bfloat16(), None),
            "int8": PackedLinear(weight, None, quantization=QUANTIZATIONS["int8"]),
            "int4": PackedLinear(weight, None, quantization=QUANTIZATIONS["int4"]),
        }
        for num_rows in NUM_ROWS:
            x = torch.randn(num_rows, K)
            num_calls = max(1, int(1e8 / (2 * num_rows * N * K)))
            figures: dict[str, list[float]] = {name: [] for name in contestants}
            for _ in range(ROUNDS):
                for name, product in contestants.items():
                    # Each has its own pool, and only one of them may have the cores.
                    if name == "oneDNN":
                        torch.set_num_threads(threads)
                    else:
                        use_threads(threads)
                    product(x)
                    figures[name].append(best_s(lambda product=product, x=x: product(x), num_calls))  # type: ignore[misc]
            us = {name: statistics.median(values) * 1e6 for name, values in figures.items()}
            rate = 2 * num_rows * N * K / us["float32"] / 1e3
            ratio = statistics.median(a / b for a, b in zip(figures["oneDNN"], figures["float32"], strict=True))
            cells = " | ".join(f"{us[name]:.1f}" for name in contestants)
            print(f"| {N} x {K} | {num_rows} | {cells} | {rate:.0f} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
