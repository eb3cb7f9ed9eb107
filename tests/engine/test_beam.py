"""Beam search is transformers', whatever else runs, and its beams share blocks as a tree."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from penstock.engine.scheduler import ScheduledBatch
from penstock.protocol import BeamParams, GenerateRequest, SamplingParams, TokenDelta
from tests.engines import build_engine, greedy, is_whole, run_to_end, tokens_of
from tests.tiny_models import reference, reference_greedy

Checkpoint = Callable[[str], Path]
NUM_TOKENS = 16


def prompt(length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (length,), generator=generator).tolist()


def beams(
    name: str, token_ids: list[int], width: int, *, n: int = 1, ends: tuple[int, ...] = (), **options: Any
) -> GenerateRequest:
    search = {name: options.pop(name) for name in ("length_penalty", "early_stopping") if name in options}
    sampling = SamplingParams(
        n=n,
        beam=BeamParams(width=width, **search),
        stop_token_ids=ends,
        **{"max_tokens": NUM_TOKENS, "ignore_eos": True, **options},
    )
    return GenerateRequest(request_id=name, prompt_token_ids=token_ids, sampling=sampling)


@torch.no_grad()
def expected(
    path: Path, token_ids: list[int], width: int, *, n: int = 1, ends: tuple[int, ...] = (), **options: Any
) -> list[list[int]]:
    output = reference(path).generate(
        torch.tensor([token_ids]),
        attention_mask=torch.ones(1, len(token_ids), dtype=torch.int64),
        do_sample=False,
        num_beams=width,
        num_return_sequences=n,
        max_new_tokens=options.pop("max_tokens", NUM_TOKENS),
        eos_token_id=list(ends) or None,
        pad_token_id=319,
        **options,
    )
    return [[token for token in row[len(token_ids) :].tolist() if token != 319] for row in output]


def found(deltas: list[TokenDelta], n: int = 1) -> list[list[int]]:
    assert len(deltas) == n
    return [tokens_of(deltas, index) for index in range(n)]


def likely_ends(path: Path, token_ids: list[int]) -> tuple[int, ...]:
    """Tokens that come up often, so that beams end."""
    seen = [token for row in expected(path, token_ids, 4, n=4) for token in row[3:]]
    return tuple(sorted(set(seen), key=lambda token: (-seen.count(token), token))[:2])


@pytest.mark.parametrize("width", [1, 2, 5])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "gemma2"])
def test_tokens_are_transformers_alone_and_in_a_mixed_batch(family: str, width: int, checkpoint: Checkpoint) -> None:
    path = checkpoint(family)
    mine = prompt(30, 1)
    wanted = expected(path, mine, width, n=width)
    for step_tokens in (512, 9):
        engine = build_engine(path, step_tokens=step_tokens)
        assert found(run_to_end(engine, [beams("b", mine, width, n=width)])["b"], width) == wanted
        others = [greedy(f"g{i}", prompt(20 + i, 50 + i), 20) for i in range(3)]
        crowd = [others[0], beams("b", mine, width, n=width), others[1], beams("c", prompt(17, 2), 3), others[2]]
        together = run_to_end(engine, crowd)
        assert found(together["b"], width) == wanted
        assert found(together["c"]) == expected(path, prompt(17, 2), 3)
        for i, other in enumerate(others):
            assert tokens_of(together[f"g{i}"]) == reference_greedy(path, other.prompt_token_ids, 20)
        assert is_whole(engine)


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize("length_penalty", [-1.0, 0.0, 1.0, 2.0])
def test_ends_and_lengths_count_as_in_transformers(
    length_penalty: float, early_stopping: Any, checkpoint: Checkpoint
) -> None:
    path = checkpoint("llama")
    engine = build_engine(path)
    lengths: set[int] = set()
    for seed in range(6):
        mine = prompt(12, 10 + seed)
        options = {"length_penalty": length_penalty, "early_stopping": early_stopping, "ends": likely_ends(path, mine)}
        deltas = run_to_end(engine, [beams("b", mine, 3, n=3, **options)])["b"]
        wanted = expected(path, mine, 3, n=3, **options)
        assert found(deltas, 3) == wanted
        for delta, tokens in zip(deltas, wanted, strict=True):
            is_end = tokens[-1] in options["ends"]
            assert (delta.finish_reason, delta.stop_reason) == (("stop", tokens[-1]) if is_end else ("length", None))
        lengths.update(map(len, wanted))
    assert len(lengths) > 1 or length_penalty > 1, "nothing ended early"
    assert is_whole(engine)


def test_beams_share_blocks(checkpoint: Checkpoint) -> None:
    engine = build_engine(checkpoint("llama"), prefix_caching=False)
    width, length = 8, 128
    engine.add(beams("b", prompt(length, 3), width))
    most = 0
    while engine.has_work:
        engine.step()
        status = engine.status()
        most = max(most, status.num_blocks - status.num_free_blocks)
    # Blocks of 4: the prompt's once, and less than each beam's own.
    assert length // 4 < most <= length // 4 + width * (NUM_TOKENS // 4 + 1)
    assert is_whole(engine)


def test_a_preempted_search_finds_the_same(checkpoint: Checkpoint) -> None:
    path = checkpoint("llama")
    engine = build_engine(path, num_blocks=50)
    run_to_end(engine, [greedy(f"short-{i}", prompt(4, i), 1) for i in range(8)])
    # What is let in as short grows, and somebody has to go.
    growing = [greedy(f"g{i}", prompt(4, 20 + i), 60) for i in range(6)]
    search = beams("b", prompt(10, 30), 3, n=2, max_tokens=40)
    deltas = run_to_end(engine, [*growing[:3], search, *growing[3:]])
    for delta in deltas["b"]:
        assert delta.timeline is not None
        assert delta.timeline.preemptions
    assert found(deltas["b"], 2) == expected(path, prompt(10, 30), 3, n=2, max_tokens=40)
    for i in range(6):
        assert tokens_of(deltas[f"g{i}"]) == reference_greedy(path, prompt(4, 20 + i), 60)
    assert is_whole(engine)


def test_stop_strings_end_beams(checkpoint: Checkpoint) -> None:
    path = checkpoint("llama")
    mine = prompt(12, 4)
    engine = build_engine(path)
    (plain,) = run_to_end(engine, [beams("b", mine, 3)])["b"]
    stop = plain.text[3:5]
    (stopped,) = run_to_end(engine, [beams("b", mine, 3, stop=(stop,))])["b"]
    assert stop not in stopped.text
    among = run_to_end(engine, [beams("b", mine, 3, n=3, stop=(stop,))])["b"]
    assert any((delta.finish_reason, delta.stop_reason) == ("stop", stop) for delta in among)
    assert all(stop not in delta.text for delta in among)
    # What holds only part of a stop string is shown in the end.
    (partly,) = run_to_end(engine, [beams("b", mine, 3, stop=(plain.text + "x",))])["b"]
    assert partly.text == plain.text
    assert is_whole(engine)


def test_log_probabilities_are_those_of_the_tokens(checkpoint: Checkpoint) -> None:
    path = checkpoint("llama")
    mine = prompt(12, 5)
    (delta,) = run_to_end(build_engine(path), [beams("b", mine, 3, logprobs=2)])["b"]
    tokens = list(delta.token_ids)
    with torch.no_grad():
        logits = reference(path)(torch.tensor([mine + tokens])).logits[0, len(mine) - 1 : -1]
    values = torch.log_softmax(logits, -1)
    assert [one.chosen.token_id for one in delta.logprobs] == tokens
    picked = [float(values[i, token]) for i, token in enumerate(tokens)]
    assert [one.chosen.logprob for one in delta.logprobs] == pytest.approx(picked, abs=1e-4)
    assert [len(one.top) for one in delta.logprobs] == [2] * NUM_TOKENS


@pytest.mark.parametrize("num_steps", [1, 2, 6])
def test_aborting_frees_every_beam(num_steps: int, checkpoint: Checkpoint) -> None:
    engine = build_engine(checkpoint("llama"), step_tokens=16)
    engine.add(beams("b", prompt(30, 6), 4))
    for _ in range(num_steps):
        engine.step()
    engine.abort("b")
    assert not engine.has_work
    assert is_whole(engine)
    assert not engine._searches
    assert not engine._outputs


def test_a_failure_takes_the_whole_search_and_nobody_else(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = checkpoint("llama")
    engine = build_engine(path)
    runner = engine._runner
    logits_of = runner._logits  # type: ignore[attr-defined]

    def broken(batch: ScheduledBatch, rows: list[int] | None) -> npt.NDArray[np.float32]:
        # Only the search is ever so long, and only once it has gone four steps.
        if 34 in batch.context_lens:
            raise RuntimeError("broken")
        out: npt.NDArray[np.float32] = logits_of(batch, rows)
        return out

    monkeypatch.setattr(runner, "_logits", broken)
    deltas = run_to_end(engine, [beams("b", prompt(30, 7), 3), greedy("g", prompt(50, 8), 20)])
    (failed,) = deltas["b"]
    assert failed.error is not None
    assert "broken" in failed.error.message
    assert tokens_of(deltas["g"]) == reference_greedy(path, prompt(50, 8), 20)
    assert not engine._searches
    assert is_whole(engine)
