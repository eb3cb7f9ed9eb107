"""Lengths follow what guesses gain and rows cost, and go to nothing where that is less than it costs."""

import random

import pytest

from penstock.engine.request import Request
from penstock.engine.speculative import DraftLengths, Offer
from penstock.engine.speculative.adaptive import StepCosts
from tests.engine.scheduler.fakes import request_of

MOST = 8


def offers(num_sequences: int) -> list[Offer]:
    made = []
    for number in range(num_sequences):
        sequence = Request(request_of(f"r{number}"), number=number, now_s=0.0, unix_s=0.0).sequences[0]
        sequence.id = number
        made.append(Offer(sequence, MOST, grade=2))
    return made


def live(
    num_steps: int,
    *,
    likely: float,
    num_sequences: int = 1,
    base_s: float = 0.010,
    row_s: float = 0.001,
    noise: float = 0.0,
    lengths: DraftLengths | None = None,
) -> tuple[DraftLengths, list[int], float]:
    """Decode for a while; return what was learned, how much was guessed in each step and the speed-up it gave."""
    rng = random.Random(1)
    lengths = lengths or DraftLengths()
    available = offers(num_sequences)
    guessed, spent_s, num_tokens = [], 0.0, 0
    for _ in range(num_steps):
        chosen = lengths.choose(num_sequences, available, 500)
        num_rows = num_sequences + sum(chosen)
        seconds = base_s + row_s * num_rows
        lengths.costs.observe(num_rows, seconds * rng.uniform(1, 1 + noise) * (5 if rng.random() < noise / 20 else 1))
        for offer, length in zip(available, chosen, strict=True):
            accepted = 0
            while accepted < length and rng.random() < likely:
                accepted += 1
            if length:
                lengths.verified(offer.sequence.id, offer.grade, length, accepted)
            num_tokens += accepted + 1
        guessed.append(sum(chosen))
        spent_s += seconds
    plain_s = num_tokens / num_sequences * (base_s + row_s * num_sequences)
    return lengths, guessed, plain_s / spent_s


@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_good_guesses_are_made_at_length(noise: float) -> None:
    _, guessed, speedup = live(400, likely=0.95, noise=noise)
    assert sum(guessed[100:]) / 300 > 6
    assert speedup > 3


@pytest.mark.parametrize("noise", [0.0, 0.5])
@pytest.mark.parametrize("num_sequences", [1, 8])
def test_bad_guesses_are_given_up_and_tried_again_now_and_then(num_sequences: int, noise: float) -> None:
    _, guessed, speedup = live(1500, likely=0.01, num_sequences=num_sequences, noise=noise)
    assert speedup > 0.97
    assert any(guessed[500:]), "what was never tried again would never be found to have become good"


@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_where_rows_cost_as_much_as_sequences_nothing_is_guessed(noise: float) -> None:
    _, guessed, speedup = live(1500, likely=0.7, num_sequences=32, base_s=0.0005, row_s=0.001, noise=noise)
    assert speedup > 0.97
    assert sum(guessed[500:]) / len(guessed[500:]) < 2


def test_lengths_come_back_when_guesses_become_good() -> None:
    lengths, _, _ = live(500, likely=0.0)
    _, guessed, _ = live(500, likely=0.95, lengths=lengths)
    assert sum(guessed[-100:]) > 500


def test_half_good_guesses_are_short() -> None:
    _, guessed, speedup = live(600, likely=0.5, row_s=0.002)
    assert 0.5 < sum(guessed[100:]) / 500 < 3
    assert speedup > 1.1


def test_no_more_is_guessed_than_there_is_room_for() -> None:
    lengths, _, _ = live(100, likely=0.95, num_sequences=4)
    assert 0 < sum(lengths.choose(4, offers(4), 3)) <= 3


def test_the_better_guesses_come_first() -> None:
    lengths, _, _ = live(100, likely=0.9, num_sequences=2)
    for _ in range(20):
        lengths.verified(0, 2, 4, 0)
    bad, good = lengths.choose(2, offers(2), 500)
    assert bad < good
    lengths.remove(0)
    lengths.remove(0)


def test_steps_that_something_else_held_up_say_little() -> None:
    costs = StepCosts()
    for _ in range(3):
        assert not costs.is_known(1)
        costs.observe(1, 0.010)
    assert costs.is_known(1)
    costs.observe(1, 10.0)
    assert costs.seconds(1) < 0.013
