"""What picking tokens from a vocabulary of 151,936 costs: `python -m benchmarks.sampling`.

Microseconds of one `Sampler.sample`, the best of several calls, for one row and for 64. Peaked logits are what a
trained model gives: a few likely tokens above a noise of others; flat ones what random weights give, where top_p keeps
most of the vocabulary.
"""

import argparse
import time
from typing import Any

import torch

from penstock.engine.sampling import Sampler
from penstock.kernels import describe, use_threads
from penstock.protocol import SamplingParams

V = 151_936
CASES: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "temperature": {},
    "top_k=50": {"top_k": 50},
    "top_p=0.95": {"top_p": 0.95},
    "min_p=0.05": {"min_p": 0.05},
    "top_k=20, top_p=0.8": {"top_k": 20, "top_p": 0.8, "temperature": 0.7},
    "greedy with penalties": {"temperature": 0.0, "repetition_penalty": 1.1, "frequency_penalty": 0.5},
    "temperature with penalties": {"repetition_penalty": 1.1, "presence_penalty": 0.5},
    "logprobs=5": {"temperature": 0.0, "logprobs": 5},
}


def draw_logits(num_rows: int, *, peaked: bool) -> torch.Tensor:
    """Return [num_rows, V]."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(num_rows, V, generator=generator)
    if peaked:
        likely = torch.randint(0, V, (num_rows, 40), generator=generator)
        logits = (logits * 2).scatter_add_(1, likely, 12 + 3 * torch.randn(num_rows, 40, generator=generator))
    return logits


def measure_us(logits: torch.Tensor, changes: dict[str, Any], num_calls: int) -> float:
    """Return the microseconds of the fastest call."""
    sampler = Sampler(vocab_size=V, eos_token_ids=(0,))
    rows = range(len(logits))
    for row in rows:
        sampler.add(row, 0, SamplingParams(**{"max_tokens": 999, "seed": row, **changes}), list(range(128)))
        for token_id in range(200, 300):
            sampler.commit(row, token_id)
    times = []
    for _ in range(num_calls):
        own = logits.clone().numpy()
        began = time.perf_counter()
        sampler.sample(own, rows)
        times.append(time.perf_counter() - began)
    return min(times) * 1e6


def main() -> None:
    """Print a row for each way of sampling."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=3)
    parser.add_argument("--calls", type=int, default=10)
    arguments = parser.parse_args()
    use_threads(arguments.threads)
    columns = [(rows, peaked) for peaked in (True, False) for rows in (1, 64)]
    print(f"microseconds, {describe()} kernels, {arguments.threads} threads\n")
    print("| | " + " | ".join(f"{'peaked' if peaked else 'flat'}, {rows} rows" for rows, peaked in columns) + " |")
    print("|---" * (1 + len(columns)) + "|")
    for name, changes in CASES.items():
        cells = [measure_us(draw_logits(rows, peaked=peaked), changes, arguments.calls) for rows, peaked in columns]
        print(f"| {name} | " + " | ".join(f"{cell:,.0f}" for cell in cells) + " |", flush=True)


if __name__ == "__main__":
    main()
