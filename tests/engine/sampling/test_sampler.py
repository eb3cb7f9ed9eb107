"""The vectorized sampler against the plainest per-row reading of each parameter."""

import math
import statistics
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from penstock.engine.sampling import Sampler
from penstock.engine.sampling.noise import stream_seed, uniform
from penstock.engine.sampling.typical import atypical
from penstock.protocol import SamplingParams

V = 50


def params_of(**changes: Any) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 99, "seed": 1, **changes})


def logits_of(rows: int, seed: int = 0, vocab: int = V) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 3


def sample(logits: torch.Tensor, params: list[SamplingParams], prompts: list[list[int]] | None = None) -> list[int]:
    sampler = Sampler(vocab_size=logits.shape[1], eos_token_ids=(0,))
    for i, one in enumerate(params):
        sampler.add(i, 0, one, prompts[i] if prompts else [])
    return [token.token_id if token else -1 for token in sampler.sample(logits.clone().numpy(), range(len(params)))]


def naive(row: torch.Tensor, params: SamplingParams) -> int:
    """Sort, cut, normalize and invert, one step at a time in float64."""
    scaled = row.double() / params.temperature
    order = torch.argsort(scaled, descending=True)
    probabilities = torch.softmax(scaled, 0)[order]
    keep = list(range(len(order)))
    if params.top_k:
        keep = keep[: params.top_k]
    if params.top_p < 1:
        mass, total, nucleus = 0.0, float(probabilities[keep].sum()), []
        for i in keep:
            if mass / total >= params.top_p:
                break
            nucleus.append(i)
            mass += float(probabilities[i])
        keep = nucleus
    keep = [i for i in keep if probabilities[i] >= params.min_p * probabilities[0]] or [0]
    if not (params.top_k or params.top_p < 1 or params.min_p):
        keep = sorted(keep, key=lambda i: int(order[i]))
    number = uniform(stream_seed(params.seed or 0, 0), 0)
    number *= float(probabilities[keep].sum())
    for i in keep:
        number -= float(probabilities[i])
        if number < 0:
            return int(order[i])
    return int(order[keep[-1]])


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"temperature": 0.3},
        {"temperature": 2.0},
        {"top_k": 1},
        {"top_k": 7},
        {"top_p": 0.5},
        {"top_p": 0.01},
        {"min_p": 0.2},
        {"min_p": 1.0},
        {"top_k": 9, "top_p": 0.7, "min_p": 0.05, "temperature": 1.5},
        {"top_k": 500},
    ],
)
def test_cutting_the_tail_equals_the_plain_reading(changes: dict[str, Any]) -> None:
    logits = logits_of(40)
    params = [params_of(seed=seed, **changes) for seed in range(40)]
    assert sample(logits, params) == [naive(row, one) for row, one in zip(logits, params, strict=True)]


def test_top_p_beyond_the_first_candidates_looks_at_all() -> None:
    logits = logits_of(20, vocab=5000) * 0.01
    params = [params_of(seed=seed, top_p=0.9) for seed in range(20)]
    assert sample(logits, params) == [naive(row, one) for row, one in zip(logits, params, strict=True)]


def test_rows_do_not_depend_on_their_neighbours() -> None:
    logits = logits_of(24)
    kinds: list[dict[str, Any]] = [{}, {"temperature": 0.0}, {"top_k": 3}, {"top_p": 0.8}, {"presence_penalty": 1.0}]
    params = [params_of(seed=seed, **kinds[seed % 5]) for seed in range(24)]
    together = sample(logits, params)
    assert together == [sample(logits[i : i + 1], [params[i]])[0] for i in range(24)]


@pytest.mark.parametrize(
    "changes",
    [
        {"logprobs": 3},
        {"logit_bias": {7: 50.0}},
        {"repetition_penalty": 9.0},
        {"min_tokens": 5, "stop_token_ids": tuple(range(V - 1))},
        {"allowed_token_ids": (3, 4)},
        {"bad_words": ((5,),)},
        {"typical_p": 0.1, "temperature": 2.0},
    ],
    ids=str,
)
def test_what_one_row_asks_for_is_done_to_it_and_to_no_other(changes: dict[str, Any]) -> None:
    logits, greedy = logits_of(4, seed=5), params_of(temperature=0.0)
    logits[:, 5] = 40.0
    asking = params_of(**{"temperature": 0.0, **changes})
    sampler = Sampler(vocab_size=V, eos_token_ids=(0,))
    for sequence_id, params in enumerate((greedy, greedy, asking, greedy)):
        sampler.add(sequence_id, 0, params, [5])
    together = logits.clone()
    sampled = sampler.sample(together.numpy(), range(4))
    alone = logits[2:3].clone()
    assert sampled[2] == sampler.sample(alone.numpy(), [2])[0]
    assert [token and token.token_id for token in (sampled[0], sampled[1], sampled[3])] == [5, 5, 5]
    assert torch.equal(together[[0, 1, 3]], logits[[0, 1, 3]])
    assert torch.equal(together[2:3], alone)
    assert "logprobs" in changes or not torch.equal(alone, logits[2:3])


def test_frequencies_follow_the_distribution() -> None:
    row = torch.tensor([0.1, 1.0, -0.5, 2.0, 0.0, -3.0])
    num_draws = 6000
    params = [params_of(seed=seed) for seed in range(num_draws)]
    counts = np.bincount(sample(row.expand(num_draws, -1), params), minlength=6)
    expected = torch.softmax(row.double(), 0).numpy() * num_draws
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    # 5 degrees of freedom; 20.5 is exceeded by chance once in a thousand, and the seeds are fixed.
    assert chi_square < 20.5
    wrong = np.roll(expected, 1)
    assert float(((counts - wrong) ** 2 / wrong).sum()) > 1000, "the test would not notice a wrong distribution"


def test_penalties_bias_and_minimum_length() -> None:
    row = torch.zeros(1, V)
    row[0, [3, 4, 5]] = torch.tensor([3.0, 2.9, -1.0])
    sampler = Sampler(vocab_size=V, eos_token_ids=(3,))

    def greedy(sequence: int, **changes: Any) -> int:
        sampler.add(sequence, 0, params_of(temperature=0.0, **changes), [3])
        (token,) = sampler.sample(row.clone().numpy(), [sequence])
        assert token is not None
        return token.token_id

    assert greedy(0) == 3
    assert greedy(1, repetition_penalty=1.2) == 4, "the prompt counts for repetition"
    assert greedy(2, presence_penalty=2.0) == 3, "the prompt does not count for presence"
    assert greedy(3, logit_bias={7: 5.0}) == 7
    assert greedy(4, min_tokens=1) == 4, "the end may not come yet"
    sampler.commit(2, 3)
    (token,) = sampler.sample(row.clone().numpy(), [2])
    assert token is not None
    assert token.token_id == 4, "the output does"
    sampler.add(5, 0, params_of(temperature=0.0, frequency_penalty=0.06), [])
    picks = []
    for _ in range(4):
        (token,) = sampler.sample(row.clone().numpy(), [5])
        assert token is not None
        picks.append(token.token_id)
        sampler.commit(5, token.token_id)
    assert picks == [3, 3, 4, 4] or picks == [3, 4, 3, 4] or picks == [3, 3, 4, 3]


def test_logprobs_are_the_models_own() -> None:
    logits = logits_of(2)
    sampler = Sampler(vocab_size=V, eos_token_ids=())
    sampler.add(0, 0, params_of(temperature=0.5, logprobs=3, logit_bias={9: 50.0}), [])
    sampler.add(1, 0, params_of(logprobs=0), [])
    first, second = sampler.sample(logits.clone().numpy(), [0, 1])
    expected = torch.log_softmax(logits, -1)
    assert first is not None
    assert first.logprobs is not None
    assert first.token_id == 9
    assert first.logprobs.chosen.logprob == pytest.approx(float(expected[0, 9]), abs=1e-5)
    assert first.logprobs.chosen.rank == int((expected[0] > expected[0, 9]).sum()) + 1
    assert [candidate.token_id for candidate in first.logprobs.top] == expected[0].topk(3).indices.tolist()
    assert second is not None
    assert second.logprobs is not None
    assert second.logprobs.top == ()


def test_numbers_that_are_not_fail_their_row_alone() -> None:
    logits = logits_of(4)
    logits[1, 5], logits[2, 6] = math.nan, math.inf
    tokens = sample(logits, [params_of(temperature=0.0)] * 4)
    assert [token < 0 for token in tokens] == [False, True, True, False]


def test_choices_and_seeds_have_streams_of_their_own() -> None:
    seeds = {stream_seed(seed, index) for seed in range(-50, 50) for index in range(20)}
    assert len(seeds) == 100 * 20
    numbers = [uniform(seed, 0) for seed in range(1000)]
    assert abs(statistics.fmean(numbers) - 0.5) < 0.03
    assert 0 <= min(numbers) < max(numbers) < 1


def test_a_seed_means_the_same_from_one_version_to_the_next() -> None:
    assert uniform(stream_seed(1, 0), 0) == 0.37217846458508463
    assert uniform(stream_seed(-3, 2), 41) == 0.6052221408987248


def typical_naive(row: torch.Tensor, temperature: float, typical_p: float) -> set[int]:
    probabilities = torch.softmax(row.double() / temperature, 0)
    surprise = -probabilities.log()
    entropy = float((probabilities * surprise).sum())
    kept: set[int] = set()
    mass = 0.0
    for token_id in sorted(range(len(row)), key=lambda one: abs(float(surprise[one]) - entropy)):
        if mass >= typical_p and kept:
            break
        kept.add(token_id)
        mass += float(probabilities[token_id])
    return kept


@pytest.mark.parametrize("typical_p", [0.01, 0.2, 0.5, 0.9])
def test_typical_tokens_are_those_whose_surprise_is_expected(typical_p: float) -> None:
    (row,) = logits_of(1, seed=4)
    kept = typical_naive(row, 1.3, typical_p)
    params = [params_of(seed=seed, temperature=1.3, typical_p=typical_p) for seed in range(400)]
    picked = set(sample(row.expand(400, -1), params))
    assert picked <= kept
    assert len(picked) > len(kept) / 2
    if typical_p == 0.2:
        assert int(row.argmax()) not in kept, "the likeliest token is not the most typical one here"


def test_the_tail_of_a_large_vocabulary_counts() -> None:
    # In single precision a sum near one would grow no more, and nothing be left out.
    row = logits_of(1, vocab=150_000) * 4 / 3
    probabilities = torch.softmax(row.double(), -1)
    dropped = torch.from_numpy(atypical(row.numpy(), np.array([[0.9999]], dtype=np.float32)))
    assert 0.99989 < float(probabilities[~dropped].sum()) < 0.99994
    assert dropped.sum() > 50_000


def test_typical_sampling_beside_tokens_that_cannot_come() -> None:
    row = logits_of(1)
    params = params_of(typical_p=0.5, allowed_token_ids=(3, 7))
    assert set(sample(row.expand(20, -1), [msgspec.structs.replace(params, seed=seed) for seed in range(20)])) <= {3, 7}


def test_scores_of_a_prompt() -> None:
    logits = logits_of(3)
    sampler = Sampler(vocab_size=V, eos_token_ids=())
    sampler.add(0, 0, params_of(prompt_logprobs=2), [])
    sampler.add(1, 0, params_of(prompt_logprobs=0), [])
    scores = sampler.score(logits.numpy(), [4, 5, 6], [0, 1, 0])
    expected = torch.log_softmax(logits, -1)
    assert [score.chosen.token_id for score in scores] == [4, 5, 6]
    assert [score.chosen.logprob for score in scores] == pytest.approx([float(expected[i, 4 + i]) for i in range(3)])
    assert [len(score.top) for score in scores] == [2, 0, 2]
