"""Scheduling, batching and caching must not change a single token of a float32 model, in any cache."""

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch

from penstock.kernels import ReferenceOps
from penstock.kernels.native import NATIVE
from penstock.kernels.native.replay import NativeReplay
from penstock.protocol import GenerateRequest, SamplingParams
from tests.engines import build_engine, greedy, is_whole, run_to_end, tokens_of
from tests.kernels.backends import needs_native
from tests.tiny_models import EVERY, UPSTREAM, VOCAB_SIZE, reference_greedy

Checkpoint = Callable[[str], Path]
NUM_TOKENS = 24
CACHES = [
    "float32",
    # torch's products depend on the batch in their last bits, and a last bit decides to which code a number is rounded.
    pytest.param("int8", marks=pytest.mark.skipif(NATIVE is None, reason="the native kernels were not built")),
]


def expected_tokens(path: Path, prompt: list[int], num_tokens: int, kv_dtype: str) -> list[int]:
    """Return the greedy continuation: transformers', or with codes of 8 bits our reference's, one request alone."""
    if kv_dtype == "float32":
        return reference_greedy(path, prompt, num_tokens)
    return list(_int8_greedy(path, tuple(prompt), num_tokens))


@lru_cache
def _int8_greedy(path: Path, prompt: tuple[int, ...], num_tokens: int) -> tuple[int, ...]:
    engine = build_engine(path, prefix_caching=False, kv_dtype="int8", ops=ReferenceOps())
    return tuple(tokens_of(run_to_end(engine, [greedy("alone", list(prompt), num_tokens)])["alone"]))


def prompt(length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCAB_SIZE, (length,), generator=generator).tolist()


def strangers(count: int, num_tokens: int = NUM_TOKENS) -> list[GenerateRequest]:
    """Greedy and random requests of all lengths."""
    lengths = [1 + (37 * i) % 90 for i in range(count)]
    return [
        greedy(f"stranger-{i}", prompt(length, 100 + i), 1 + (11 * i) % num_tokens, temperature=float(i % 2))
        for i, length in enumerate(lengths)
    ]


@pytest.mark.parametrize("kv_dtype", CACHES)
@pytest.mark.parametrize("family", EVERY)
def test_greedy_tokens_equal_the_references_alone_and_among_32(
    family: str, kv_dtype: str, checkpoint: Checkpoint
) -> None:
    path = checkpoint(family)
    mine = prompt(50, 1)
    expected = expected_tokens(path, mine, NUM_TOKENS, kv_dtype)
    assert len(set(expected)) > 4, "a model that repeats one token would hide a wrong cache"
    alone = run_to_end(build_engine(path, kv_dtype=kv_dtype), [greedy("mine", mine, NUM_TOKENS)])
    assert tokens_of(alone["mine"]) == expected
    engine = build_engine(path, num_blocks=2000, kv_dtype=kv_dtype)
    crowd = strangers(32)
    together = run_to_end(engine, [*crowd[:16], greedy("mine", mine, NUM_TOKENS), *crowd[16:]])
    assert tokens_of(together["mine"]) == expected
    assert is_whole(engine)


@pytest.mark.parametrize("step_tokens", [1, 3, 16, 50, 200])
@pytest.mark.parametrize("kv_dtype", CACHES)
@pytest.mark.parametrize(
    "family", ["llama", "mistral", "qwen2-windows", "gemma2", "gemma3", "phi3-partial", "qwen3-moe", *UPSTREAM]
)
def test_any_chunk_size_gives_the_same_tokens(
    family: str, kv_dtype: str, step_tokens: int, checkpoint: Checkpoint
) -> None:
    path = checkpoint(family)
    mine = prompt(50, 2)
    engine = build_engine(path, step_tokens=step_tokens, kv_dtype=kv_dtype)
    found = tokens_of(run_to_end(engine, [greedy("mine", mine, 12)])["mine"])
    assert found == expected_tokens(path, mine, 12, kv_dtype)
    assert is_whole(engine)


@pytest.mark.parametrize("kv_dtype", CACHES)
@pytest.mark.parametrize("family", EVERY)
def test_prefix_cache_changes_no_token(family: str, kv_dtype: str, checkpoint: Checkpoint) -> None:
    path = checkpoint(family)
    shared = prompt(41, 3)
    prompts = [shared, shared + prompt(9, 4), shared[:30] + prompt(20, 5), shared]
    with_cache = build_engine(path, kv_dtype=kv_dtype)
    without = build_engine(path, kv_dtype=kv_dtype, prefix_caching=False)
    for turn in range(2):
        for i, one in enumerate(prompts):
            name = f"{turn}-{i}"
            cached = run_to_end(with_cache, [greedy(name, one, 12)])[name]
            plain = run_to_end(without, [greedy(name, one, 12)])[name]
            assert tokens_of(cached) == tokens_of(plain) == expected_tokens(path, one, 12, kv_dtype)
            assert plain[-1].usage is not None
            assert plain[-1].usage.num_cached_tokens == 0
    assert with_cache.status().counters.num_prefix_hits > 5 * 28
    assert is_whole(with_cache)
    assert is_whole(without)


def test_salted_requests_share_only_with_their_own(checkpoint: Checkpoint) -> None:
    engine = build_engine(checkpoint("llama"))

    def cached(name: str, salt: str) -> int:
        request = GenerateRequest(
            request_id=name,
            prompt_token_ids=prompt(40, 6),
            sampling=SamplingParams(max_tokens=2),
            cache_salt=salt,
        )
        usage = run_to_end(engine, [request])[name][-1].usage
        assert usage is not None
        return usage.num_cached_tokens

    assert [cached("a", ""), cached("b", "blue"), cached("c", "blue"), cached("d", "")] == [0, 0, 36, 36]


@pytest.mark.parametrize("kv_dtype", CACHES)
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_preemption_changes_no_token(family: str, kv_dtype: str, checkpoint: Checkpoint) -> None:
    path = checkpoint(family)
    prompts = [prompt(20, 20 + i) for i in range(8)]
    # First answers are short, so the scheduler expects little growth; then everybody grows past the pool.
    engine = build_engine(path, num_blocks=40, kv_dtype=kv_dtype)
    run_to_end(engine, [greedy(f"short-{i}", one, 1) for i, one in enumerate(prompts)])
    deltas = run_to_end(engine, [greedy(f"long-{i}", one, 60) for i, one in enumerate(prompts)])
    if family == "llama":
        assert engine.status().counters.num_preemptions > 0
    for i, one in enumerate(prompts):
        assert tokens_of(deltas[f"long-{i}"]) == expected_tokens(path, one, 60, kv_dtype)
    assert is_whole(engine)
    timelines = [deltas[f"long-{i}"][-1].timeline for i in range(len(prompts))]
    preempted = sum(len(timeline.preemptions) for timeline in timelines if timeline is not None)
    assert preempted == engine.status().counters.num_preemptions


def test_choices_share_their_prompt_and_part_ways(checkpoint: Checkpoint) -> None:
    path = checkpoint("llama")
    mine = prompt(38, 7)
    engine = build_engine(path)
    request = GenerateRequest(
        request_id="n",
        prompt_token_ids=mine,
        sampling=SamplingParams(max_tokens=12, n=5, seed=11, ignore_eos=True),
    )
    deltas = run_to_end(engine, [request])["n"]
    choices = [tokens_of(deltas, index) for index in range(5)]
    assert all(len(choice) == 12 for choice in choices)
    assert len({tuple(choice) for choice in choices}) == 5
    assert [delta.finish_reason for delta in deltas if delta.finish_reason] == ["length"] * 5
    assert is_whole(engine)
    # Each choice is what it would have been in other company.
    again = run_to_end(build_engine(path, step_tokens=7, num_blocks=600), [*strangers(9), request])["n"]
    assert [tokens_of(again, index) for index in range(5)] == choices


@pytest.mark.parametrize("kv_dtype", CACHES)
def test_greedy_choices_are_all_the_same(kv_dtype: str, checkpoint: Checkpoint) -> None:
    path = checkpoint("qwen3")
    mine = prompt(22, 8)
    deltas = run_to_end(build_engine(path, kv_dtype=kv_dtype), [greedy("n", mine, 10, n=3)])["n"]
    assert [tokens_of(deltas, index) for index in range(3)] == [expected_tokens(path, mine, 10, kv_dtype)] * 3


def test_seeds_decide_whatever_else_runs(checkpoint: Checkpoint) -> None:
    path = checkpoint("llama")

    def request(name: str, seed: int) -> GenerateRequest:
        return GenerateRequest(
            request_id=name,
            prompt_token_ids=prompt(30, 9),
            sampling=SamplingParams(max_tokens=20, seed=seed, top_p=0.9, temperature=0.9, ignore_eos=True),
        )

    alone = tokens_of(run_to_end(build_engine(path), [request("a", 5)])["a"])
    crowd = run_to_end(
        build_engine(path, num_blocks=900, step_tokens=33), [*strangers(20), request("a", 5), request("b", 6)]
    )
    assert tokens_of(crowd["a"]) == alone
    assert tokens_of(crowd["b"]) != alone


@needs_native
def test_steps_begun_ahead_change_no_token(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    path = checkpoint("llama")
    requests = [
        greedy(f"{i}", prompt(3 + 5 * i, i), 6 + 9 * i, temperature=float(i % 2), seed=i, ignore_eos=False)
        for i in range(6)
    ]

    def tokens() -> dict[str, list[int]]:
        """Return everybody's, where they come one after another and one leaves."""
        engine = build_engine(path, block_size=8)
        found: dict[str, list[int]] = {}
        waiting, num_steps = requests[:], 0
        while waiting or engine.has_work:
            if waiting and num_steps % 5 == 0:
                engine.add(waiting.pop(0))
            if num_steps == 27:
                engine.abort("3")
            for delta in engine.step():
                found.setdefault(delta.request_id, []).extend(delta.token_ids)
            num_steps += 1
        assert is_whole(engine)
        return found

    draw, num_drawn = NativeReplay.draw, 0

    def counted(*args: Any, **options: Any) -> list[int] | None:
        nonlocal num_drawn
        drawn = draw(*args, **options)
        num_drawn += drawn is not None
        return drawn

    monkeypatch.setattr(NativeReplay, "draw", counted)
    ahead = tokens()
    assert num_drawn > 30
    monkeypatch.setattr(NativeReplay, "draw", lambda *_, **__: None)
    assert tokens() == ahead
