"""A guess can fail nobody: not by what it does to the model, nor by failing itself."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from penstock.engine.scheduler import ScheduledBatch
from penstock.engine.speculative import Offer
from tests.engine.speculative.fakes import Prophet, speculate
from tests.engines import build_engine, greedy, is_whole, run_to_end, tokens_of

Checkpoint = Callable[[str], Path]
POISON = 255
PROMPTS = {f"{i}": [i + 1, i + 2, i + 3] for i in range(3)}
REQUESTS = [greedy(name, prompt, 12, logit_bias={POISON: -100.0}) for name, prompt in PROMPTS.items()]


class Poisoner(Prophet):
    """Guesses what must not be computed, behind one right guess."""

    def draft(self, chosen: Sequence[tuple[Offer, int]]) -> list[list[int]]:
        return [[*draft[:1], POISON, *draft[2:]] for draft in super().draft(chosen)]


class Broken(Prophet):
    def draft(self, chosen: Sequence[tuple[Offer, int]]) -> list[list[int]]:
        raise ValueError("broken")


@pytest.mark.parametrize("kind", ["raise", "nan"])
def test_what_breaks_on_a_guess_goes_on_without_it(
    kind: str, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = checkpoint("llama")
    expected = {name: tokens_of(deltas) for name, deltas in run_to_end(build_engine(path), REQUESTS).items()}
    engine = build_engine(path)
    speculate(engine, Poisoner({(name, 0): tokens for name, tokens in expected.items()}, one_in=10**9))
    runner = engine._runner
    logits_of = runner._logits  # type: ignore[attr-defined]
    num_poisoned = 0

    def breaking(batch: ScheduledBatch, rows: list[int] | None) -> npt.NDArray[np.float32]:
        nonlocal num_poisoned
        out: npt.NDArray[np.float32] = logits_of(batch, rows)
        poisoned = np.array(batch.token_ids) == POISON
        num_poisoned += int(poisoned.sum())
        if kind == "raise" and poisoned.any():
            raise RuntimeError("poisoned")
        out[poisoned if rows is None else poisoned[rows]] = np.nan
        return out

    monkeypatch.setattr(runner, "_logits", breaking)
    found = run_to_end(engine, REQUESTS)
    assert num_poisoned
    assert {name: tokens_of(deltas) for name, deltas in found.items()} == expected
    assert is_whole(engine)


def test_a_drafter_that_fails_is_done_without(checkpoint: Checkpoint) -> None:
    path = checkpoint("llama")
    expected = {name: tokens_of(deltas) for name, deltas in run_to_end(build_engine(path), REQUESTS).items()}
    engine = speculate(build_engine(path), Broken({(name, 0): [] for name in PROMPTS}, one_in=2))
    found = run_to_end(engine, REQUESTS)
    assert {name: tokens_of(deltas) for name, deltas in found.items()} == expected
    assert engine.status().counters.num_draft_tokens == 0
    assert is_whole(engine)
