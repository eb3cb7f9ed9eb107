"""What is sampled with guesses has the distribution of what is sampled without them, and the test could tell."""

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import product

import numpy as np
import pytest
import torch

from penstock.engine.sampling import SampledToken, Sampler
from penstock.engine.speculative import kept_tokens
from penstock.protocol import SamplingParams

VOCAB_SIZE = 5
LENGTH = 3
NUM_SAMPLES = 6000
Verify = Callable[[Sequence[SampledToken | None], Sequence[int]], list[SampledToken]]

# What the target says after each token (the last row: at first), and what is guessed, whatever was said.
LOGITS = torch.randn(VOCAB_SIZE + 1, VOCAB_SIZE, generator=torch.Generator().manual_seed(3)) * 1.3
GUESSES = [2, 0, 4]


def generate(params: SamplingParams, verify: Verify, *, num_guesses: int) -> list[tuple[int, ...]]:
    """Return texts of ``LENGTH`` tokens, made as the engine does: steps verify drafts and keep what ``verify`` says."""
    sampler = Sampler(vocab_size=VOCAB_SIZE, eos_token_ids=())
    said: dict[int, list[int]] = {}
    for sequence_id in range(NUM_SAMPLES):
        sampler.add(sequence_id, sequence_id, params, [])
        said[sequence_id] = []
    while unfinished := [sequence_id for sequence_id, tokens in said.items() if len(tokens) < LENGTH]:
        drafts, contexts, rows = {}, [], []
        for sequence_id in unfinished:
            tokens = said[sequence_id]
            draft = GUESSES[len(tokens) :][: min(num_guesses, LENGTH - len(tokens) - 1)]
            drafts[sequence_id] = draft
            contexts += [tokens[-1] if tokens else VOCAB_SIZE, *draft]
            rows += [sequence_id] * (1 + len(draft))
        sampled = sampler.sample(LOGITS[contexts].numpy(), rows, None, drafts)
        first = 0
        for sequence_id in unfinished:
            draft = drafts[sequence_id]
            for token in verify(sampled[first : first + 1 + len(draft)], draft):
                sampler.commit(sequence_id, token.token_id)
                said[sequence_id].append(token.token_id)
            first += 1 + len(draft)
    return [tuple(tokens) for tokens in said.values()]


def probabilities(temperature: float) -> dict[tuple[int, ...], float]:
    """Return how likely each text is."""
    table = torch.softmax(LOGITS.double() / temperature, dim=-1)
    found = {}
    for text in product(range(VOCAB_SIZE), repeat=LENGTH):
        likely, before = 1.0, VOCAB_SIZE
        for token in text:
            likely *= float(table[before, token])
            before = token
        found[text] = likely
    return found


def p_value(texts: list[tuple[int, ...]], expected: dict[tuple[int, ...], float]) -> float:
    """Return Pearson's chi-square test of ``texts``; those expected fewer than five times count as one."""
    counts = Counter(texts)
    rare = [text for text, likely in expected.items() if likely * len(texts) < 5]
    seen = [counts[text] for text in expected if text not in rare] + [sum(counts[text] for text in rare)]
    due = [expected[text] * len(texts) for text in expected if text not in rare]
    due.append(len(texts) - sum(due))
    statistic = sum((number - mean) ** 2 / mean for number, mean in zip(seen, due, strict=True))
    degrees = torch.tensor(len(due) - 1, dtype=torch.float64)
    return float(torch.special.gammaincc(degrees / 2, torch.tensor(statistic, dtype=torch.float64) / 2))


def too_willing(sampled: Sequence[SampledToken | None], draft: Sequence[int]) -> list[SampledToken]:
    """Keep a guess that was not drawn every sixteenth time: what a biased verifier would do."""
    kept = kept_tokens(sampled, draft)
    if len(kept) <= len(draft) and hash(tuple(token.token_id for token in sampled if token)) % 16 == 0:
        kept[-1] = SampledToken(draft[len(kept) - 1])
    return kept


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("num_guesses", [0, 1, 2])
def test_guesses_do_not_change_the_distribution(num_guesses: int, temperature: float) -> None:
    params = SamplingParams(max_tokens=LENGTH, temperature=temperature, seed=1)
    texts = generate(params, kept_tokens, num_guesses=num_guesses)
    assert p_value(texts, probabilities(temperature)) > 0.001


def test_a_biased_verifier_is_found_out() -> None:
    params = SamplingParams(max_tokens=LENGTH, temperature=1.0, seed=1)
    texts = generate(params, too_willing, num_guesses=2)
    assert p_value(texts, probabilities(1.0)) < 1e-6


def test_guesses_are_accepted_as_often_as_they_are_likely() -> None:
    params = SamplingParams(max_tokens=LENGTH, temperature=1.0, seed=1)
    accepted = sum(text[0] == GUESSES[0] for text in generate(params, kept_tokens, num_guesses=1))
    likely = float(torch.softmax(LOGITS[VOCAB_SIZE].double(), dim=-1)[GUESSES[0]])
    assert accepted / NUM_SAMPLES == pytest.approx(likely, abs=4 * np.sqrt(likely * (1 - likely) / NUM_SAMPLES))


def test_nothing_counts_behind_a_wrong_guess_or_numbers_that_are_none() -> None:
    tokens = [SampledToken(token_id) for token_id in (7, 8, 9)]
    assert kept_tokens(tokens, [7, 8]) == tokens
    assert kept_tokens(tokens, [7, 5]) == tokens[:2]
    assert kept_tokens(tokens, [5, 8]) == tokens[:1]
    assert kept_tokens([tokens[0], None, tokens[2]], [7, 8]) == tokens[:1]
    assert kept_tokens([None, *tokens[1:]], [7, 8]) == []
