"""The four loads, and which figures count for each."""

from collections.abc import Callable
from dataclasses import dataclass

from penstock.bench import LengthRange, RunReport, Workload

_MIXED = LengthRange(low=32, high=256)


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """One number of a run."""

    key: str
    label: str
    get: Callable[[RunReport], float]
    less_is_better: bool = False


def _tokens_per_s(run: RunReport) -> float:
    return run.output_tokens_per_s


def _stream_tokens_per_s(run: RunReport) -> float:
    assert run.stream_tokens_per_s is not None
    return run.stream_tokens_per_s


def _prefill_tokens_per_s(run: RunReport) -> float:
    assert run.ttft is not None
    return run.num_prompt_tokens / run.num_whole / run.ttft.mean_s


def _latency(name: str, point: str) -> Callable[[RunReport], float]:
    return lambda run: float(getattr(getattr(run, name), f"{point}_s"))


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """A load and what is read off it."""

    label: str
    workload: Workload
    figures: tuple[Figure, ...]


LOADS = {
    "a": Load(
        label="one stream: a prompt of 128 tokens, an answer of 128",
        workload=Workload(
            num_requests=1,
            prompt_tokens=LengthRange(low=128, high=128),
            output_tokens=LengthRange(low=128, high=128),
            concurrency=1,
        ),
        figures=(
            Figure(key="tokens_per_s", label="(a) tokens/s", get=_tokens_per_s),
            Figure(key="stream_tokens_per_s", label="(a) after the first token", get=_stream_tokens_per_s),
        ),
    ),
    "b": Load(
        label="prefill: a prompt of 2048 tokens, an answer of 1",
        workload=Workload(
            num_requests=1,
            prompt_tokens=LengthRange(low=2048, high=2048),
            output_tokens=LengthRange(low=1, high=1),
            concurrency=1,
        ),
        figures=(Figure(key="prefill_tokens_per_s", label="(b) prompt tokens/s", get=_prefill_tokens_per_s),),
    ),
    "c": Load(
        label="64 requests at once, prompts and answers of 32..256 tokens",
        workload=Workload(num_requests=64, prompt_tokens=_MIXED, output_tokens=_MIXED, concurrency=64),
        figures=(Figure(key="tokens_per_s", label="(c) tokens/s", get=_tokens_per_s),),
    ),
    "d": Load(
        label="16 clients that stream, 64 requests, prompts and answers of 32..256 tokens",
        workload=Workload(num_requests=64, prompt_tokens=_MIXED, output_tokens=_MIXED, concurrency=16, seed=1),
        figures=(
            Figure(key="tokens_per_s", label="(d) tokens/s", get=_tokens_per_s),
            *(
                Figure(key=f"{name}_{point}_s", label=label, get=_latency(name, point), less_is_better=True)
                for name, point, label in (
                    ("ttft", "p50", "(d) TTFT p50, s"),
                    ("ttft", "p99", "(d) TTFT p99, s"),
                    ("inter_token", "p50", "(d) inter-token p50, s"),
                    ("inter_token", "p99", "(d) inter-token p99, s"),
                )
            ),
        ),
    ),
}
"""By the letters the README uses"""

CACHE_TOKENS = 32_768
"""Tokens of KV cache each system is given: every load fits, the largest 64 requests of 512."""
MAX_RUNNING = 64
