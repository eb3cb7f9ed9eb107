"""A profiled engine does what it did before, and every nanosecond of its steps is some part's."""

from collections.abc import Callable
from pathlib import Path

import pytest

from penstock.engine.host import EngineHost
from penstock.engine.profiling import Profiler
from penstock.engine.profiling.ops import attended
from penstock.models import read_config
from tests.engines import build_engine, greedy, run_to_end, tokens_of
from tests.packing import layout_of

REQUESTS = [greedy(str(i), [5 + i] * (9 + i), max_tokens=4) for i in range(3)]
ALWAYS = {
    "schedule",
    "inputs",
    "embed",
    "rope_angles",
    "attention plan",
    "rms_norm",
    "qkv",
    "rope_write_kv",
    "attention",
    "o",
    "gate_up",
}


def profiled(path: Path) -> tuple[Profiler, dict[str, list[int]]]:
    """Run ``REQUESTS`` and return what was recorded and the tokens."""
    profiler = Profiler()
    host = EngineHost(profiler.around_engine(build_engine(path, profiler=profiler)), lambda: None)
    assert not host.has_work
    tokens: dict[str, list[int]] = {request.request_id: [] for request in REQUESTS}
    for request in REQUESTS:
        host._engine.add(request)
    while host.has_work:
        for delta in host.step().deltas:
            tokens[delta.request_id] += delta.token_ids
    return profiler, tokens


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_steps_are_cut_into_their_parts_without_gaps(family: str, checkpoint: Callable[[str], Path]) -> None:
    path = checkpoint(family)
    profiler, tokens = profiled(path)
    plain = run_to_end(build_engine(path), REQUESTS)
    assert tokens == {request_id: tokens_of(deltas) for request_id, deltas in plain.items()}
    config = read_config(path)
    assert [step.is_decode for step in profiler.steps] == [False, True, True, True]
    assert [step.num_tokens for step in profiler.steps] == [9 + 10 + 11, 3, 3, 3]
    for number, step in enumerate(profiler.steps):
        parts = [span.part for span in step.spans]
        assert set(parts) == ALWAYS | {"down", "lm_head", "sampling", "output", "between ops"} | (
            {"between steps"} if number else set()
        )
        assert parts.count("attention") == parts.count("qkv") == config.num_layers
        for span, following in zip(step.spans, step.spans[1:], strict=False):
            assert span.began_ns <= span.ended_ns == following.began_ns


def test_work_is_counted(checkpoint: Callable[[str], Path]) -> None:
    path = checkpoint("llama")
    profiler, _ = profiled(path)
    config = read_config(path)
    E, F = config.hidden_size, config.intermediate_size
    (down, *_), step = [span for span in profiler.steps[1].spans if span.part == "down"], profiler.steps[1]
    assert down.num_ops == 2 * 3 * E * F
    assert down.num_bytes == 4 * (E * F + 3 * (E + F))
    gate_up = next(span for span in step.spans if span.part == "gate_up")
    assert gate_up.num_ops == 2 * 3 * E * 2 * F
    attention = next(span for span in step.spans if span.part == "attention")
    num_seen, D = 10 + 11 + 12, config.head_dim
    assert attention.num_ops == 4 * num_seen * config.num_heads * D
    assert attention.num_bytes == 4 * (2 * num_seen * config.num_kv_heads * D + 2 * 3 * config.num_heads * D)


@pytest.mark.parametrize("window", [None, 1, 3, 8, 100])
def test_what_attention_sees(window: int | None) -> None:
    query_lens, context_lens = [1, 5, 7], [9, 5, 12]
    layout = layout_of(query_lens, context_lens, [[0], [1], [2]], 16)
    pairs = [
        (s, key)
        for s, (num_queries, context_len) in enumerate(zip(query_lens, context_lens, strict=True))
        for query in range(context_len - num_queries, context_len)
        for key in range(query + 1)
        if window is None or key > query - window
    ]
    assert attended(layout, window) == (len(set(pairs)), len(pairs))


def test_what_was_recorded_can_be_forgotten(checkpoint: Callable[[str], Path]) -> None:
    profiler, _ = profiled(checkpoint("llama"))
    profiler.clear()
    assert profiler.steps == []
