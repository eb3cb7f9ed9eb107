"""Pooled states and scores of prompts are the model's own, whatever else runs, is cached or is preempted."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from penstock.engine.engine import Engine
from penstock.engine.scheduler import ScheduledBatch
from penstock.protocol import GenerateRequest, Pooling, SamplingParams, TokenDelta
from tests.engines import build_engine, greedy, is_whole, run_to_end, tokens_of
from tests.tiny_models import UPSTREAM, reference, reference_greedy, reference_logits

Checkpoint = Callable[[str], Path]
POOLINGS: tuple[Pooling, ...] = ("mean", "last")


def prompt(length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (length,), generator=generator).tolist()


def pooled(name: str, token_ids: list[int], pooling: Pooling) -> GenerateRequest:
    return GenerateRequest(
        request_id=name, prompt_token_ids=token_ids, sampling=SamplingParams(max_tokens=0), pooling=pooling
    )


def scored(name: str, token_ids: list[int], start: int) -> GenerateRequest:
    sampling = SamplingParams(max_tokens=0, prompt_logprobs=0, prompt_logprobs_from=start)
    return GenerateRequest(request_id=name, prompt_token_ids=token_ids, sampling=sampling)


@torch.no_grad()
def expected_vector(path: Path, token_ids: list[int], pooling: Pooling) -> np.ndarray:
    states = reference(path).base_model(torch.tensor([token_ids])).last_hidden_state[0].double()
    vector: np.ndarray = (states.mean(0) if pooling == "mean" else states[-1]).numpy()
    return vector


def expected_scores(path: Path, token_ids: list[int], start: int) -> list[float]:
    values = torch.log_softmax(reference_logits(path, token_ids), dim=-1)
    return [float(values[i - 1, token_ids[i]]) for i in range(start, len(token_ids))]


def vector_of(deltas: list[TokenDelta]) -> np.ndarray:
    (delta,) = deltas
    assert delta.embedding is not None
    assert (delta.finish_reason, delta.token_ids, delta.text) == ("length", (), "")
    return np.frombuffer(delta.embedding, dtype="<f4")


def scores_of(deltas: list[TokenDelta]) -> list[float]:
    (delta,) = deltas
    assert delta.embedding is None
    return [score.chosen.logprob for score in delta.prompt_logprobs]


def num_cached(deltas: list[TokenDelta]) -> int:
    usage = deltas[-1].usage
    assert usage is not None
    return usage.num_cached_tokens


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "gemma2", "gemma3", "granite", *UPSTREAM])
def test_vectors_are_the_references_alone_and_in_a_mixed_batch(
    family: str, pooling: Pooling, checkpoint: Checkpoint
) -> None:
    path = checkpoint(family)
    mine = prompt(50, 1)
    expected = expected_vector(path, mine, pooling)
    for step_tokens in (512, 7):
        engine = build_engine(path, step_tokens=step_tokens)
        alone = vector_of(run_to_end(engine, [pooled("mine", mine, pooling)])["mine"])
        assert np.abs(alone - expected).max() <= 1e-4
        others = [greedy(f"g{i}", prompt(20 + i, 50 + i), 20) for i in range(4)]
        crowd = [*others[:2], pooled("mine", mine, pooling), scored("s", prompt(30, 9), 10), *others[2:]]
        together = run_to_end(engine, crowd)
        assert np.abs(vector_of(together["mine"]) - expected).max() <= 1e-4
        for i, other in enumerate(others):
            assert tokens_of(together[f"g{i}"]) == reference_greedy(path, other.prompt_token_ids, 20)
        assert scores_of(together["s"]) == pytest.approx(expected_scores(path, prompt(30, 9), 10), abs=1e-4)
        assert is_whole(engine)


def test_the_prefix_cache_serves_what_has_no_states_to_give(checkpoint: Checkpoint) -> None:
    path = checkpoint("llama")
    mine = prompt(42, 2)
    engine = build_engine(path)
    run_to_end(engine, [greedy("before", mine, 2)])
    for pooling, reusable in (("mean", 0), ("last", 40)):
        assert pooling in POOLINGS
        deltas = run_to_end(engine, [pooled(pooling, mine, pooling)])[pooling]
        assert num_cached(deltas) == reusable
        assert np.abs(vector_of(deltas) - expected_vector(path, mine, pooling)).max() <= 1e-4
    # Scores need the states of the token before the first of them, and of all that follow.
    for start, reusable in ((1, 0), (20, 16), (21, 20), (41, 40), (42, 40)):
        deltas = run_to_end(engine, [scored(f"from {start}", mine, start)])[f"from {start}"]
        assert num_cached(deltas) == reusable
        assert scores_of(deltas) == pytest.approx(expected_scores(path, mine, start), abs=1e-4)
    # And what a pooled prompt computed is there for those who generate.
    other = prompt(42, 3)
    run_to_end(engine, [pooled("first", other, "mean")])
    deltas = run_to_end(engine, [greedy("then", other, 8)])["then"]
    assert num_cached(deltas) == 40
    assert tokens_of(deltas) == reference_greedy(path, other, 8)
    assert is_whole(engine)


def preempted(engine: Engine) -> int:
    return engine.status().counters.num_preemptions


@pytest.mark.parametrize("pooling", POOLINGS)
def test_preemption_in_the_middle_of_a_prompt_changes_nothing(pooling: Pooling, checkpoint: Checkpoint) -> None:
    path = checkpoint("llama")
    engine = build_engine(path, num_blocks=40, step_tokens=8)
    # What is admitted as short grows long, while prompts are read in chunks.
    run_to_end(engine, [greedy("short", prompt(4, 1), 1)])
    growing = [greedy(f"g{i}", prompt(4, 20 + i), 60) for i in range(4)]
    reading = [pooled(f"p{i}", prompt(60, 30 + i), pooling) for i in range(3)]
    scores = scored("s", prompt(60, 40), 5)
    deltas = run_to_end(engine, [*growing, *reading, scores])
    assert preempted(engine) > 0
    for i in range(3):
        found = vector_of(deltas[f"p{i}"])
        assert np.abs(found - expected_vector(path, prompt(60, 30 + i), pooling)).max() <= 1e-4
    assert scores_of(deltas["s"]) == pytest.approx(expected_scores(path, prompt(60, 40), 5), abs=1e-4)
    assert is_whole(engine)


def test_aborting_in_the_middle_leaves_nothing(checkpoint: Checkpoint) -> None:
    engine = build_engine(checkpoint("llama"), step_tokens=8)
    engine.add(pooled("mine", prompt(60, 1), "mean"))
    for _ in range(3):
        assert engine.step() == []
    engine.abort("mine")
    assert not engine.has_work
    assert is_whole(engine)
    assert not engine._pooled


def test_a_prompt_may_fill_the_context(checkpoint: Checkpoint) -> None:
    path = checkpoint("llama")
    engine = build_engine(path, num_blocks=16)
    mine = prompt(64, 1)
    found = vector_of(run_to_end(engine, [pooled("mine", mine, "mean")])["mine"])
    assert np.abs(found - expected_vector(path, mine, "mean")).max() <= 1e-4


def test_numbers_that_are_not_finite_fail_their_request_alone(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = build_engine(checkpoint("llama"))
    runner = engine._runner
    replayed = runner._replayed  # type: ignore[attr-defined]

    def broken(batch: ScheduledBatch, rows: None) -> npt.NDArray[np.float32]:
        states: npt.NDArray[np.float32] = replayed(batch, rows)
        states[np.array(batch.token_ids) == 7] = np.nan
        return states

    monkeypatch.setattr(runner, "_replayed", broken)
    bad = [pooled("pooled", [1, 7, 2], "mean"), scored("scored", [1, 7, 2], 1)]
    deltas = run_to_end(engine, [*bad, pooled("fine", [1, 2, 3], "mean")])
    for name in ("pooled", "scored"):
        (delta,) = deltas[name]
        assert delta.error is not None
        assert "not finite" in delta.error.message
    vector_of(deltas["fine"])
    assert is_whole(engine)
