"""How speed scales: `python -m benchmarks.curves --out benchmarks/results/2026-01-31-curves`.

Four curves of Penstock's engine in this process, each at 1, 2 and 4 threads: throughput against concurrency, decode
speed against context, prefill speed against prompt length, and time per step against batch size. Weights are random,
of a small shape unless `--shape` names another; decoding is greedy past the end of sequence. At each place the numbers
of threads take turns; medians of the rounds are drawn, least and most around them. A place whose round takes long is
measured in that one round: the whole of Qwen2.5-0.5B's shape in INT8 is meant to take less than 25 minutes.
"""

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.peers.machine import busy_s, describe_machine, own_cpu_s, source_commit
from benchmarks.peers.model import SHAPES, make_model, prompt_token_ids
from benchmarks.peers.report import spread
from penstock.bench import require_plots
from penstock.engine.config import CacheConfig, RunnerConfig, SchedulerConfig, SpeculationConfig
from penstock.engine.engine import Engine
from penstock.kernels import describe, use_threads
from penstock.launch.engine import build_engine
from penstock.launch.settings import ModelSettings, Settings
from penstock.protocol import GenerateRequest, SamplingParams

CONCURRENCY = (1, 2, 4, 8, 16, 32, 64, 128, 256)
CONTEXT = (128, 256, 512, 1024, 2048, 4096, 8192, 16384)
PROMPT_TOKENS = 16
ANSWER_TOKENS = 32
NUM_STEPS = 12
"""Decode steps timed after each context; their median is the point's."""
LONG_S = 10.0
"""A round that takes longer is not repeated: what disturbs a second is little beside it."""

Point = tuple[str, int, float]
"""A curve, where on it, and the value"""


class Bench:
    """An engine and a source of fresh prompts, so that no prefix is found in the cache."""

    def __init__(self, engine: Engine, token_ids: range) -> None:
        self._engine = engine
        self._token_ids = token_ids
        self._draw = random.Random(0)
        self._num_requests = 0

    def add(self, num_prompt_tokens: int, num_tokens: int) -> None:
        """Queue a request."""
        self._num_requests += 1
        self._engine.add(
            GenerateRequest(
                request_id=str(self._num_requests),
                prompt_token_ids=self._draw.choices(self._token_ids, k=num_prompt_tokens),
                sampling=SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True),
            )
        )

    @property
    def has_work(self) -> bool:
        """Whether a request has not ended."""
        return self._engine.has_work

    def step(self) -> int:
        """Run a step and return how many requests got a token."""
        assert self._engine.has_work
        return sum(bool(delta.token_ids) for delta in self._engine.step())

    def drain(self) -> None:
        """Run what is left."""
        while self.has_work:
            self.step()


def one_load(bench: Bench, concurrency: int) -> Iterator[Point]:
    """Output tokens a second of ``concurrency`` requests that come at once, and milliseconds of a step in which all of
    them decode.
    """
    for _ in range(concurrency):
        bench.add(PROMPT_TOKENS, ANSWER_TOKENS)
    whole, num_last = [], 0
    began = step_began = time.perf_counter()
    while bench.has_work:
        num_answered, step_ended = bench.step(), time.perf_counter()
        # Nobody's prompt is in a step before which all had a token.
        if num_last == concurrency == num_answered:
            whole.append(step_ended - step_began)
        num_last, step_began = num_answered, step_ended
    yield "throughput", concurrency, concurrency * ANSWER_TOKENS / (time.perf_counter() - began)
    yield "step", concurrency, 1e3 * statistics.median(whole)


def one_context(bench: Bench, num_tokens: int) -> Iterator[Point]:
    """Prompt tokens a second of one prompt, then tokens a second after it."""
    began = time.perf_counter()
    bench.add(num_tokens, NUM_STEPS + 1)
    while not bench.step():
        pass
    yield "prefill", num_tokens, num_tokens / (time.perf_counter() - began)
    yield "decode", num_tokens, 1 / _median_step_s(bench)
    bench.drain()


def _median_step_s(bench: Bench) -> float:
    times = []
    for _ in range(NUM_STEPS):
        began = time.perf_counter()
        bench.step()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


LABELS = {
    "throughput": ("requests at once", "output tokens/s"),
    "decode": ("context, tokens", "tokens/s of one stream"),
    "prefill": ("prompt, tokens", "prompt tokens/s"),
    "step": ("batch, sequences", "ms per decode step"),
}
"""Each curve's axes"""


def measure(bench: Bench, threads: Sequence[int], rounds: int, longest: int) -> dict[str, dict[int, dict[int, Any]]]:
    """Return for each curve, number of threads and place on it the spread of all rounds, and how many those were."""
    contexts = [context for context in CONTEXT if context <= longest]
    plan: list[tuple[Callable[[Bench, int], Iterator[Point]], Sequence[int]]] = [
        (one_load, CONCURRENCY),
        (one_context, contexts),
    ]
    found: dict[tuple[str, int, int], list[float]] = {}
    for work, places in plan:
        for place in places:
            for _ in range(rounds):
                began = time.perf_counter()
                for num_threads in threads:
                    use_threads(num_threads)
                    for curve, x, value in work(bench, place):
                        found.setdefault((curve, num_threads, x), []).append(value)
                round_s = time.perf_counter() - began
                print(f"{work.__name__} {place}: {round_s:.1f} s", flush=True)
                if round_s > LONG_S:
                    break
    curves: dict[str, dict[int, dict[int, Any]]] = {curve: {n: {} for n in threads} for curve in LABELS}
    for (curve, num_threads, x), values in found.items():
        curves[curve][num_threads][x] = {**spread(values), "rounds": len(values)}
    return curves


def write_plot(file: Path, curves: dict[str, dict[int, dict[int, Any]]], title: str) -> None:
    """Draw the four curves, a line for each number of threads."""
    require_plots()
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(2, 2, figsize=(12, 8), layout="constrained")
    figure.suptitle(title)
    for axes, (curve, (x_label, y_label)) in zip(panels.flat, LABELS.items(), strict=True):
        for num_threads, points in curves[curve].items():
            places = list(points)
            axes.plot(
                places,
                [points[x]["median"] for x in places],
                "o-",
                ms=3,
                label=f"{num_threads} thread{'s' * (num_threads > 1)}",
            )
            axes.fill_between(places, [points[x]["min"] for x in places], [points[x]["max"] for x in places], alpha=0.2)
        axes.set_xscale("log", base=2)
        axes.set_xticks(places, map(str, places))
        axes.set(xlabel=x_label, ylabel=y_label, ylim=(0, None))
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--quantize", help="as `penstock serve` takes it")
    parser.add_argument("--threads", default="1,2,4")
    parser.add_argument("--rounds", type=int, default=3, help=f"of places whose round takes less than {LONG_S:g} s")
    parser.add_argument("--longest", type=int, default=CONTEXT[-1], help="longest context, tokens")
    parser.add_argument("--out", type=Path, metavar="STEM", help="write STEM.json and STEM.png")
    arguments = parser.parse_args()
    require_plots()
    threads = [int(number) for number in arguments.threads.split(",")]
    shape = SHAPES[arguments.shape]
    with tempfile.TemporaryDirectory() as directory:
        model = make_model(Path(directory) / arguments.shape, shape)
        num_cached_tokens = 2 * max(arguments.longest, CONCURRENCY[-1] * (PROMPT_TOKENS + ANSWER_TOKENS))
        settings = Settings(
            model=ModelSettings(name=str(model)),
            scheduler=SchedulerConfig(max_running=CONCURRENCY[-1]),
            # Twice what 16 bits take: kernels without them keep 32.
            cache=CacheConfig(memory_bytes=2 * num_cached_tokens * shape.kv_bytes_per_token),
            runner=RunnerConfig(quantize=arguments.quantize),
            # Random weights go round in circles, which would be guessed too well.
            speculation=SpeculationConfig(method="off"),
        )
        bench = Bench(build_engine(settings), prompt_token_ids(shape))
        began, busy, own = time.perf_counter(), busy_s(), own_cpu_s()
        curves = measure(bench, threads, arguments.rounds, arguments.longest)
        others_cores = (busy_s() - busy - (own_cpu_s() - own)) / (time.perf_counter() - began)
    conditions: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="minutes"),
        "commit": source_commit(),
        "command": " ".join(["python -m benchmarks.curves", *sys.argv[1:]]),
        "machine": {**describe_machine(), "kernels": describe()},
        "shape": arguments.shape,
        "precision": arguments.quantize or "bfloat16",
        "seconds": time.perf_counter() - began,
        "cores_busy_with_others": others_cores,
    }
    text = json.dumps({"conditions": conditions, "curves": curves}, indent=1)
    print(text)
    if arguments.out is not None:
        Path(f"{arguments.out}.json").write_text(text + "\n")
        what = f"{arguments.shape}, {conditions['precision']}, {conditions['machine']['processor']}"
        when = f"{conditions['date'][:10]}, {conditions['commit']}"
        write_plot(Path(f"{arguments.out}.png"), curves, f"{what}, {when}")


if __name__ == "__main__":
    main()
