"""Lookups find what came before, the longest and latest, and go on with it."""

import random
from collections.abc import Callable, Sequence

import pytest

from penstock.engine.request import Request
from penstock.engine.request import Sequence as EngineSequence
from penstock.engine.speculative import LookupDrafter, NgramIndex, SuffixIndex
from penstock.engine.speculative.lookup import Index, Match
from tests.engine.scheduler.fakes import request_of

MakeIndex = Callable[[Sequence[int]], Index]


def sequence_of(prompt: list[int]) -> EngineSequence:
    request = Request(request_of("r", prompt=prompt, max_tokens=1000), number=0, now_s=0.0, unix_s=0.0)
    request.sequences[0].id = 5
    return request.sequences[0]


def guess(drafter: LookupDrafter, sequence: EngineSequence, most: int) -> list[int]:
    offer = drafter.offer(sequence, most)
    return [] if offer is None else drafter.draft([(offer, offer.most)])[0]


def longest_before(token_ids: Sequence[int], least: int) -> int:
    """Return the longest end of ``token_ids`` that ends earlier as well, by trying all; 0 if shorter than ``least``."""
    found = [
        length
        for length in range(least, len(token_ids))
        if any(token_ids[end - length : end] == token_ids[-length:] for end in range(length, len(token_ids)))
    ]
    return max(found, default=0)


@pytest.mark.parametrize("num_kinds", [2, 4, 8])
def test_suffixes_are_the_longest_there_are(num_kinds: int) -> None:
    rng = random.Random(num_kinds)
    token_ids = [rng.randrange(num_kinds) for _ in range(20)]
    index = SuffixIndex(token_ids)
    num_found = 0
    for _ in range(150):
        token_ids.append(rng.randrange(num_kinds))
        longest, match = longest_before(token_ids, 3), index.find(token_ids)
        assert (match is None) == (longest == 0)
        if match is not None:
            num_found += 1
            assert token_ids[match.end - match.length : match.end] == token_ids[-match.length :]
            assert match.end < len(token_ids)
            # Of many occurrences only the latest are tried.
            assert match.length == longest or num_kinds == 2
    assert num_found > 10


def test_the_latest_of_equals_is_taken() -> None:
    assert SuffixIndex([]).find([1, 2, 3, 4, 0, 1, 2, 3, 5, 0, 1, 2, 3]) == Match(4, 8)
    assert NgramIndex([1, 2, 3, 4, 1, 2, 3, 5, 6]).find([1, 2, 3]) == Match(3, 7)


def test_prompt_lookup_knows_the_prompt_alone() -> None:
    index = NgramIndex([1, 2, 3, 4, 5, 6, 7])
    assert index.find([1, 2, 3, 4, 5, 6, 7, 8, 2, 3, 4]) == Match(3, 4)
    assert index.find([1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 8, 9, 10]) is None
    assert index.find([1, 2, 3, 4, 5, 6, 7]) is None, "what ends the prompt is what is to be guessed"
    assert NgramIndex([1]).find([1]) is None


@pytest.mark.parametrize("make_index", [NgramIndex, SuffixIndex])
def test_what_followed_is_guessed_to_follow(make_index: MakeIndex) -> None:
    drafter = LookupDrafter(make_index)
    sequence = sequence_of([10, 11, 12, 13, 14, 15, 16, 17, 18, 0, 10, 11])
    assert guess(drafter, sequence, 4) == []
    sequence.token_ids.append(12)
    assert guess(drafter, sequence, 4) == [13, 14, 15, 16]
    sequence.token_ids += [13, 14]
    assert guess(drafter, sequence, 3) == [15, 16, 17]
    sequence.token_ids.append(99)
    assert guess(drafter, sequence, 3) == []


def test_a_text_that_repeats_itself_is_guessed_to_go_on() -> None:
    drafter = LookupDrafter(SuffixIndex)
    sequence = sequence_of([1, 2, 3, 1, 2, 3])
    assert guess(drafter, sequence, 8) == [1, 2, 3, 1, 2, 3, 1, 2]
    sequence = sequence_of([7, 7, 7, 7])
    sequence.id = 6
    assert guess(drafter, sequence, 5) == [7] * 5


def test_the_better_the_ground_the_higher_the_grade() -> None:
    drafter = LookupDrafter(SuffixIndex)
    text = list(range(100, 140))
    sequence = sequence_of([*text, 0])
    grades = []
    for token_id in text:
        sequence.token_ids.append(token_id)
        offer = drafter.offer(sequence, 1)
        grades.append(0 if offer is None else offer.grade)
    assert grades == sorted(grades)
    assert set(grades) == {0, 2, 3, 4, 5}


def test_what_is_removed_is_forgotten() -> None:
    drafter = LookupDrafter(SuffixIndex)
    assert guess(drafter, sequence_of([1, 2, 3, 4, 1, 2, 3]), 1) == [4]
    drafter.remove(5)
    drafter.remove(5)
    assert guess(drafter, sequence_of([1, 2, 3, 9, 1, 2, 3]), 1) == [9]
