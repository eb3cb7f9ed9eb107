"""Sequences that follow a grammar: preempted, forked, among others, and with grammars that cannot be followed."""

import json
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from penstock.engine.sampling import GrammarMasks
from penstock.protocol import TokenDelta
from penstock.text.grammar import json_schema_grammar, lark_grammar, regex_grammar
from tests.engines import build_engine, greedy, is_whole, run_to_end, tokens_of

Checkpoint = Callable[[str], Path]
SCHEMA = {
    "type": "object",
    "properties": {"id": {"type": "integer"}, "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "minItems": 2}},
    "required": ["id", "tags"],
    "additionalProperties": False,
}


def text_of(deltas: list[TokenDelta], index: int = 0) -> str:
    return "".join(delta.text for delta in deltas if delta.index == index)


def test_preemption_changes_no_token(checkpoint: Checkpoint) -> None:
    path = checkpoint("llama")
    grammar = json_schema_grammar(SCHEMA)
    requests = [
        greedy(f"{i}", [i, i + 1, i + 2] * 5, 120, ignore_eos=False, temperature=i % 2 * 0.9, seed=i, grammar=grammar)
        for i in range(6)
    ]
    alone = [tokens_of(run_to_end(build_engine(path), [request])[request.request_id]) for request in requests]
    # First answers are short, so the scheduler expects little growth; then everybody grows past the pool.
    tight = build_engine(path, num_blocks=40)
    run_to_end(tight, [greedy(f"short-{i}", [i] * 15, 1) for i in range(8)])
    plain = greedy("plain", [9] * 20, 60)
    together = run_to_end(tight, [*requests, plain])
    assert tight.status().counters.num_preemptions > 0
    assert [tokens_of(together[request.request_id]) for request in requests] == alone
    assert tokens_of(together["plain"]) == tokens_of(run_to_end(build_engine(path), [plain])["plain"])
    for request in requests:
        deltas = together[request.request_id]
        if deltas[-1].finish_reason == "stop":
            assert set(json.loads(text_of(deltas))) == {"id", "tags"}
    assert is_whole(tight)


def test_choices_follow_the_grammar_each_on_its_own(checkpoint: Checkpoint) -> None:
    engine = build_engine(checkpoint("llama"))
    request = greedy(
        "n", [1, 2, 3], 30, n=5, temperature=1.5, seed=1, ignore_eos=False, grammar=regex_grammar("(ab|cde)[xyz]{9}")
    )
    deltas = run_to_end(engine, [request])["n"]
    texts = {text_of(deltas, index) for index in range(5)}
    assert len(texts) > 1
    assert {text[:-9] for text in texts} == {"ab", "cde"}
    assert is_whole(engine)


def test_a_grammar_that_cannot_be_followed_to_the_end_fails_alone(checkpoint: Checkpoint) -> None:
    engine = build_engine(checkpoint("llama"))
    # An endless text of which every letter is known: the parser looks ahead until it gives up.
    endless = greedy("endless", [1, 2, 3], 30, ignore_eos=False, grammar=lark_grammar('start: "a" start'))
    deltas = run_to_end(engine, [greedy("other", [4, 5], 30), endless])
    error = deltas["endless"][-1].error
    assert error is not None
    assert error.code == "invalid_request"
    assert "too complex" in error.message
    assert len(tokens_of(deltas["other"])) == 30
    assert is_whole(engine)


class StuckMatcher:
    """A matcher whose mask does not come before ``release``."""

    def __init__(self) -> None:
        self.release = threading.Event()

    def compute_bitmask(self) -> bytes:
        self.release.wait()
        return bytes(40)


@pytest.mark.parametrize("position", [0, 1, 2])
def test_a_mask_that_takes_too_long_holds_nobody_up(position: int, checkpoint: Checkpoint) -> None:
    engine = build_engine(checkpoint("llama"))
    engine._runner._masks = GrammarMasks(longest_s=0.05)  # type: ignore[attr-defined]
    stuck = StuckMatcher()
    requests = [
        greedy(
            f"{i}", [i + 1], 8, n=1, ignore_eos=False, grammar=regex_grammar("[ab]{4}" if i != position else "[0-9]+")
        )
        for i in range(3)
    ]
    for request in requests:
        engine.add(request, engine.grammars.compile(request.sampling.grammar or ""))
    masks = engine._runner._masks  # type: ignore[attr-defined]
    masks._matchers[position] = stuck
    try:
        deltas = run_to_end(engine)
    finally:
        stuck.release.set()
    for i in range(3):
        error = deltas[f"{i}"][-1].error
        if i == position:
            assert error is not None
            assert "took over 0.05 s" in error.message
        else:
            assert error is None
            assert set(text_of(deltas[f"{i}"])) <= set("ab")
            assert deltas[f"{i}"][-1].finish_reason == "stop"
    assert is_whole(engine)
