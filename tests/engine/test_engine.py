"""The engine's edges: what it refuses, what fails alone, how text ends."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from penstock.engine.output import ChoiceOutput
from penstock.engine.scheduler import ScheduledBatch
from penstock.errors import ContextTooLong, InvalidRequest
from penstock.protocol import SamplingParams
from penstock.text import Tokenizer
from tests.engines import build_engine, greedy, is_whole, run_to_end, tokens_of
from tests.tiny_models import EOS_ID, reference_greedy

Checkpoint = Callable[[str], Path]


@pytest.mark.parametrize(("kind", "words"), [("raise", "RuntimeError: poisoned"), ("nan", "not finite")])
def test_a_request_that_breaks_the_step_fails_alone(
    kind: str, words: str, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = checkpoint("llama")
    engine = build_engine(path)
    runner = engine._runner
    logits_of = runner._logits  # type: ignore[attr-defined]
    poison = 255

    def breaking(batch: ScheduledBatch, rows: list[int] | None) -> npt.NDArray[np.float32]:
        out: npt.NDArray[np.float32] = logits_of(batch, rows)
        poisoned = np.array(batch.token_ids) == poison
        if kind == "raise" and poisoned.any():
            raise RuntimeError("poisoned")
        out[poisoned if rows is None else poisoned[rows]] = np.nan
        return out

    monkeypatch.setattr(runner, "_logits", breaking)
    healthy = {f"healthy-{i}": [i, i + 1, i + 2] for i in range(7)}
    requests = [greedy(name, prompt, 8) for name, prompt in healthy.items()]
    deltas = run_to_end(engine, [*requests[:3], greedy("bad", [1, 2, poison], 8), *requests[3:]])
    error = deltas["bad"][-1].error
    assert error is not None
    assert error.code == "step_failed"
    assert words in error.message
    for name, prompt in healthy.items():
        expected = reference_greedy(path, prompt, 8)
        if poison not in expected:
            assert tokens_of(deltas[name]) == expected
    assert is_whole(engine)


def test_stale_values_in_reused_blocks_do_not_leak(checkpoint: Checkpoint) -> None:
    path = checkpoint("llama")
    engine = build_engine(path, num_blocks=16)
    for kv in engine._runner._cache:  # type: ignore[attr-defined]
        for array in kv.tensors():
            array.numpy()[:] = np.nan
    prompts = [[5, 6, 7], [9] * 11, [3]]
    deltas = run_to_end(engine, [greedy(str(i), prompt, 6) for i, prompt in enumerate(prompts)])
    for i, prompt in enumerate(prompts):
        assert tokens_of(deltas[str(i)]) == reference_greedy(path, prompt, 6)


def test_what_can_never_run_is_refused_without_a_trace(checkpoint: Checkpoint) -> None:
    engine = build_engine(checkpoint("llama"))
    with pytest.raises(InvalidRequest, match="empty"):
        engine.add(greedy("a", [], 1))
    with pytest.raises(InvalidRequest, match="320 is not in the vocabulary"):
        engine.add(greedy("a", [320], 1))
    with pytest.raises(InvalidRequest, match="not in the vocabulary"):
        engine.add(greedy("a", [1], 1, logit_bias={999: 1.0}))
    with pytest.raises(ContextTooLong, match="513"):
        engine.add(greedy("a", [1] * 513, 1))
    engine.add(greedy("a", [1], 5))
    with pytest.raises(InvalidRequest, match="running already"):
        engine.add(greedy("a", [1], 1))
    run_to_end(engine)
    assert is_whole(engine)
    assert not engine._requests
    assert not engine._outputs


def test_abort_at_any_moment_frees_everything(checkpoint: Checkpoint) -> None:
    for num_steps in range(6):
        engine = build_engine(checkpoint("llama"), step_tokens=9)
        engine.add(greedy("one", list(range(20)), 30, n=3))
        engine.add(greedy("two", list(range(20)), 30))
        for _ in range(num_steps):
            engine.step()
        engine.abort("one")
        engine.abort("unknown")
        deltas = run_to_end(engine)
        assert "one" not in deltas
        assert len(tokens_of(deltas["two"])) > 20
        assert is_whole(engine)


class TestOutput:
    @pytest.fixture
    def tokenizer(self, checkpoint: Checkpoint) -> Tokenizer:
        return Tokenizer.load(checkpoint("llama"))

    def text(self, tokenizer: Tokenizer, text: str, **changes: object) -> tuple[list[str], object, object]:
        """Push ``text`` byte by byte; return the pieces, the finish reason and the stop reason."""
        params = SamplingParams(**{"max_tokens": 100, **changes})  # type: ignore[arg-type]
        output = ChoiceOutput(params, tokenizer, frozenset({EOS_ID}))
        pieces = []
        for token_id in tokenizer.encode(text, add_special_tokens=False):
            step = output.push(token_id)
            pieces.append(step.text)
            if step.finish_reason:
                return pieces, step.finish_reason, step.stop_reason
        return [*pieces, output.flush()], None, None

    def test_half_characters_wait(self, tokenizer: Tokenizer) -> None:
        assert self.text(tokenizer, "é👍")[0] == ["", "é", "", "", "", "👍", ""]
        assert self.text(tokenizer, "👍", max_tokens=2)[0] == ["", "�"], "the last token shows what is left"

    def test_stop_strings_are_held_back_across_tokens(self, tokenizer: Tokenizer) -> None:
        pieces, reason, stop = self.text(tokenizer, "an end, an END and more", stop=("END",))
        assert ("".join(pieces), reason, stop) == ("an end, an ", "stop", "END")
        pieces, _, _ = self.text(tokenizer, "an END", stop=("END",), include_stop_str_in_output=True)
        assert "".join(pieces) == "an END"
        assert "".join(self.text(tokenizer, "an EN", stop=("END",))[0]) == "an EN"

    def test_stops_wait_for_the_minimum_and_nothing_is_lost(self, tokenizer: Tokenizer) -> None:
        pieces, reason, stop = self.text(tokenizer, "a.b.c", stop=(".",), min_tokens=3)
        assert ("".join(pieces), reason, stop) == ("a.b", "stop", ".")
        pieces, reason, stop = self.text(tokenizer, "a##b#", stop=("##b", "##"), min_tokens=3)
        assert ("".join(pieces), reason, stop) == ("a", "stop", "##b"), "one that ends later may begin before"
        assert "".join(self.text(tokenizer, "a.b.c", stop=(".",), min_tokens=5)[0]) == "a.b.c"

    def test_end_tokens(self, tokenizer: Tokenizer) -> None:
        assert self.text(tokenizer, "hi<|im_end|>x")[1:] == ("stop", None)
        assert self.text(tokenizer, "hi<|im_end|>x", ignore_eos=True)[1] is None
        assert self.text(tokenizer, "hi<|im_end|>x", ignore_eos=True, skip_special_tokens=False)[0][2] == "<|im_end|>"
        x = tokenizer.encode("x", add_special_tokens=False)[0]
        assert self.text(tokenizer, "hix", stop_token_ids=(x,))[1:] == ("stop", x)

    def test_an_end_token_that_is_shown_comes_after_what_was_held_back(self, tokenizer: Tokenizer) -> None:
        x = tokenizer.encode("x", add_special_tokens=False)[0]
        pieces, *_ = self.text(tokenizer, "a#x", stop=("##",), stop_token_ids=(x,), include_stop_str_in_output=True)
        assert "".join(pieces) == "a#x"


def test_prompt_logprobs_in_chunks_and_after_preemption_are_whole(checkpoint: Checkpoint) -> None:
    path = checkpoint("llama")
    prompts = [[(7 * i + j) % 250 for j in range(30)] for i in range(6)]
    requests = [greedy(f"{i}", prompt, 40, prompt_logprobs=1, n=1 + i % 2) for i, prompt in enumerate(prompts)]
    whole = build_engine(path)
    tight = build_engine(path, num_blocks=40, step_tokens=7, max_running=7)
    run_to_end(tight, [greedy(f"short-{i}", prompt, 1) for i, prompt in enumerate(prompts)])
    expected, chunked = run_to_end(whole, requests), run_to_end(tight, requests)
    assert tight.status().counters.num_preemptions > 0
    for i, prompt in enumerate(prompts):
        for deltas in (expected[f"{i}"], chunked[f"{i}"]):
            (first,) = [delta for delta in deltas if delta.prompt_logprobs]
            assert (first.index, first) == (0, next(delta for delta in deltas if delta.index == 0))
            assert [score.chosen.token_id for score in first.prompt_logprobs] == prompt[1:]
        values = [
            [score.chosen.logprob for delta in deltas[f"{i}"] for score in delta.prompt_logprobs]
            for deltas in (expected, chunked)
        ]
        assert values[0] == pytest.approx(values[1], abs=1e-5)
    assert is_whole(tight)
