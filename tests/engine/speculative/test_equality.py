"""With speculation and without: the same tokens, log-probabilities, texts and ends, whatever runs beside."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from penstock.engine.engine import Engine
from penstock.kernels import ops_for
from penstock.kernels.native import NATIVE
from penstock.protocol import GenerateRequest, SamplingParams, TokenDelta
from penstock.text.grammar import json_schema_grammar
from tests.engine.speculative.fakes import with_draft_model, with_prophet, with_suffixes
from tests.engines import build_engine, greedy, is_whole, run_to_end, tokens_of
from tests.tiny_models import EOS_ID, VOCAB_SIZE

Checkpoint = Callable[[str], Path]
# torch's products depend on the batch in their last bits.
native = pytest.mark.skipif(NATIVE is None, reason="the native kernels were not built")


def prompt(length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCAB_SIZE, (length,), generator=generator).tolist()


def sampled(name: str, tokens: list[int], num_tokens: int, **sampling: Any) -> GenerateRequest:
    params = {"max_tokens": num_tokens, "seed": 7, "ignore_eos": True, **sampling}
    return GenerateRequest(request_id=name, prompt_token_ids=tokens, sampling=SamplingParams(**params))


def every_way(prompts: int = 40) -> list[GenerateRequest]:
    """One request for each thing that sampling can be asked."""
    schema = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", "yy"]}}, "required": ["a"]}
    ways: dict[str, dict[str, Any]] = {
        "greedy": {"temperature": 0},
        "plain": {},
        "cold": {"temperature": 0.3, "top_k": 5},
        "nucleus": {"top_p": 0.8, "min_p": 0.01},
        "typical": {"typical_p": 0.7},
        "repetition": {"temperature": 0, "repetition_penalty": 1.3},
        "penalties": {"presence_penalty": 0.5, "frequency_penalty": 0.7},
        "banned": {"temperature": 0, "bad_words": ((5,), (9, 7), (100, 101, 102))},
        "allowed": {"allowed_token_ids": tuple(range(0, 300, 7))},
        "biased": {"logit_bias": {3: 4.0, 250: 2.0}},
        "minimum": {"min_tokens": 9, "ignore_eos": False, "logit_bias": {EOS_ID: 9.0}},
        "ended": {"ignore_eos": False, "logit_bias": {EOS_ID: 5.0}},
        "stopped": {"stop": ("e", "s", "A"), "min_tokens": 2},
        "stop token": {"stop_token_ids": tuple(range(0, 320, 9)), "min_tokens": 3},
        "logprobs": {"temperature": 0, "logprobs": 3, "prompt_logprobs": 1},
        "choices": {"n": 4},
        "json": {"temperature": 0, "ignore_eos": False, "grammar": json_schema_grammar(schema)},
        "random json": {"ignore_eos": False, "grammar": json_schema_grammar(schema), "logprobs": 1},
    }
    return [
        sampled(name, prompt(3 + i * 5 % prompts, i), 24, **params) for i, (name, params) in enumerate(ways.items())
    ]


def said(deltas: list[TokenDelta]) -> list[Any]:
    """Return all that the deltas of a request add up to."""
    choices = []
    for index in sorted({delta.index for delta in deltas}):
        mine = [delta for delta in deltas if delta.index == index]
        last = mine[-1]
        choices.append(
            (
                tokens_of(mine, index),
                "".join(delta.text for delta in mine),
                [logprobs for delta in mine for logprobs in delta.logprobs],
                [logprobs for delta in mine for logprobs in delta.prompt_logprobs],
                (last.finish_reason, last.stop_reason, last.error),
                last.usage and (last.usage.num_prompt_tokens, last.usage.num_output_tokens),
            )
        )
        assert all(delta.finish_reason is None for delta in mine[:-1])
    return choices


def accepted(engine: Engine) -> tuple[int, int]:
    """Return how many tokens were guessed and how many of them came true."""
    assert engine._speculator is not None
    counters = engine._speculator.counters
    return counters.num_draft_tokens, counters.num_accepted_tokens


@native
@pytest.mark.parametrize("one_in", [2, 5, 10**9])
@pytest.mark.parametrize(
    ("family", "dtype", "quantize", "kv_dtype"),
    [
        ("llama", "float32", None, "float32"),
        ("mistral", "float32", None, "int8"),
        ("gemma2", "bfloat16", "int8", "bfloat16"),
        ("qwen3", "bfloat16", "int4", "int8"),
    ],
)
def test_guesses_right_and_wrong_change_nothing(
    family: str, dtype: str, quantize: str | None, kv_dtype: str, one_in: int, checkpoint: Checkpoint
) -> None:
    ops = ops_for(dtype, quantize)
    plain = partial(build_engine, checkpoint(family), dtype=dtype, kv_dtype=kv_dtype, ops=ops)
    requests = every_way()
    expected = {request.request_id: said(run_to_end(plain(), [request])[request.request_id]) for request in requests}
    # Half of them guess, beside those that do not.
    engine = with_prophet(plain(num_blocks=2000, step_tokens=100), plain, requests, one_in)
    found = run_to_end(engine, requests)
    assert {name: said(deltas) for name, deltas in found.items()} == expected
    num_drafted, num_accepted = accepted(engine)
    assert num_drafted > 100
    assert num_accepted > 0
    assert all(len(delta.token_ids) == 1 for deltas in found.values() for delta in deltas)
    assert is_whole(engine)


@native
@pytest.mark.parametrize("step_tokens", [1, 2, 5, 23])
@pytest.mark.parametrize("prefix_caching", [True, False])
def test_in_any_chunks_and_with_a_prefix_cache(step_tokens: int, prefix_caching: bool, checkpoint: Checkpoint) -> None:
    path = checkpoint("llama")
    requests = every_way()
    plain = partial(build_engine, path, prefix_caching=False)
    expected = {request.request_id: said(run_to_end(plain(), [request])[request.request_id]) for request in requests}
    engine = with_prophet(
        build_engine(path, num_blocks=2000, step_tokens=step_tokens, prefix_caching=prefix_caching), plain, requests, 4
    )
    # More choices than tokens in a step are refused, for want of a step in which all can decode.
    requests = [request for request in requests if request.sampling.n <= step_tokens]
    for _ in range(2):
        found = run_to_end(engine, requests)
        assert {name: said(deltas) for name, deltas in found.items()} == {
            request.request_id: expected[request.request_id] for request in requests
        }
        assert is_whole(engine)
    assert (accepted(engine)[1] > 0) == (step_tokens > 2)


@native
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_preempted_sequences_say_the_same(family: str, checkpoint: Checkpoint) -> None:
    path = checkpoint(family)
    requests = [sampled(f"{i}", prompt(20, 20 + i), 60, temperature=i % 2) for i in range(8)]
    plain = partial(build_engine, path)
    expected = {request.request_id: said(run_to_end(plain(), [request])[request.request_id]) for request in requests}
    # First answers are short, so the scheduler expects little growth; then everybody grows past the pool.
    engine = build_engine(path, num_blocks=60, step_tokens=24)
    run_to_end(engine, [greedy(f"short-{i}", prompt(20, i), 1) for i in range(8)])
    found = run_to_end(with_prophet(engine, plain, requests, 4), requests)
    assert {name: said(deltas) for name, deltas in found.items()} == expected
    if family == "llama":
        assert engine.status().counters.num_preemptions > 0
    assert accepted(engine)[1] > 0
    assert is_whole(engine)


@native
def test_lookups_change_nothing(checkpoint: Checkpoint) -> None:
    path = checkpoint("llama")
    requests = [*every_way(), greedy("loop", [1, 2, 3, 4] * 6, 60, logit_bias={1: 3.0, 2: 3.0, 3: 3.0})]
    expected = run_to_end(build_engine(path, num_blocks=2000), requests)
    engine = with_suffixes(build_engine(path, num_blocks=2000))
    found = run_to_end(engine, requests)
    assert {name: said(deltas) for name, deltas in found.items()} == {
        name: said(deltas) for name, deltas in expected.items()
    }
    assert accepted(engine)[1] > 0
    assert is_whole(engine)


@native
def test_aborting_at_any_moment_frees_everything(checkpoint: Checkpoint) -> None:
    path = checkpoint("llama")
    requests = [greedy("one", prompt(20, 1), 30, n=3), greedy("two", prompt(20, 1), 30)]
    plain = partial(build_engine, path)
    expected = tokens_of(run_to_end(plain(), requests[1:])["two"])
    for num_steps in range(8):
        engine = with_prophet(build_engine(path, step_tokens=12), plain, requests, 3)
        for request in requests:
            engine.add(request)
        said_so_far: list[TokenDelta] = []
        for _ in range(num_steps):
            said_so_far += engine.step()
        engine.abort("one")
        said_so_far += run_to_end(engine).get("two", [])
        assert tokens_of([delta for delta in said_so_far if delta.request_id == "two"]) == expected
        assert is_whole(engine)


@native
def test_a_draft_model_that_is_the_target_is_always_right(checkpoint: Checkpoint) -> None:
    path = checkpoint("llama")
    # What the draft model does not do is follow grammars.
    requests = [request for request in every_way() if request.sampling.grammar is None]
    expected = run_to_end(build_engine(path, num_blocks=2000), requests)
    engine = with_draft_model(build_engine(path, num_blocks=2000), path)
    for turn in range(2):
        found = run_to_end(engine, requests)
        for name, deltas in expected.items():
            assert said(found[name]) == said(deltas), (turn, name)
    num_drafted, num_accepted = accepted(engine)
    assert num_accepted == num_drafted > 500
    assert is_whole(engine)


@native
@pytest.mark.parametrize(("target", "num_blocks"), [("llama", 2000), ("mistral", 2000), ("llama", 60)])
def test_a_draft_model_that_is_another_changes_nothing(target: str, num_blocks: int, checkpoint: Checkpoint) -> None:
    requests = [request for request in every_way() if num_blocks > 60 or request.sampling.n == 1]
    expected = {
        request.request_id: said(run_to_end(build_engine(checkpoint(target)), [request])[request.request_id])
        for request in requests
    }
    engine = build_engine(checkpoint(target), num_blocks=num_blocks, step_tokens=30)
    engine._scheduler.cache.window = None
    with_draft_model(engine, checkpoint("qwen3"))
    found = run_to_end(engine, requests)
    assert {name: said(deltas) for name, deltas in found.items()} == expected
    num_drafted, num_accepted = accepted(engine)
    assert num_accepted < num_drafted
    assert is_whole(engine)
