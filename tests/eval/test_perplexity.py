"""Perplexity beside a direct computation with transformers, by the same protocol."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer as Backend

from penstock.errors import InvalidSetting
from penstock.eval import PerplexityTask, cut_windows, perplexity, window_nats
from penstock.eval.tasks.perplexity import LOSS, TOKEN_PERPLEXITY, WORD_PERPLEXITY
from penstock.models.decoder import load_model
from penstock.text import Tokenizer
from tests.eval.conftest import TEXT, OpenSubject
from tests.tiny_models import reference_logits

WINDOW = 128


def direct_nats(path: Path, begin: list[int]) -> list[float]:
    """Return each window's negative log-likelihood as transformers has it; windows begin with ``begin``."""
    ids = Backend.from_file(str(path / "tokenizer.json")).encode(TEXT, add_special_tokens=False).ids
    size = WINDOW - len(begin)
    nats = []
    for start in range(0, len(ids) - size + 1, size):
        window = begin + ids[start : start + size]
        logits = reference_logits(path, window)
        nats.append(float(F.cross_entropy(logits[:-1], torch.tensor(window[1:]), reduction="sum")))
    return nats


async def test_the_engine_agrees_with_transformers(
    checkpoint: Callable[[str], Path], open_subject: OpenSubject, no_progress: Callable[[int, int], None]
) -> None:
    path = checkpoint("qwen2")
    async with open_subject(path) as subject:
        found = await PerplexityTask("text", TEXT, window=WINDOW).score(subject, limit=None, on_item=no_progress)
    expected = direct_nats(path, [])
    assert len(expected) > 8
    np.testing.assert_allclose(found[:, 0], expected, rtol=1e-4)
    loss = sum(expected) / (len(expected) * (WINDOW - 1))
    num_tokens = len(Backend.from_file(str(path / "tokenizer.json")).encode(TEXT).ids)
    sums = found.sum(0)
    assert LOSS.of(sums) == pytest.approx(loss, rel=1e-4)
    assert TOKEN_PERPLEXITY.of(sums) == pytest.approx(math.exp(loss), rel=1e-4)
    assert WORD_PERPLEXITY.of(sums) == pytest.approx(math.exp(loss * num_tokens / len(TEXT.split())), rel=1e-3)


async def test_where_a_text_begins_with_a_token_so_does_every_window(
    bos_checkpoint: Path, open_subject: OpenSubject, no_progress: Callable[[int, int], None]
) -> None:
    begin = Backend.from_file(str(bos_checkpoint / "tokenizer.json")).token_to_id("<|begin|>")
    assert begin is not None
    async with open_subject(bos_checkpoint) as subject:
        found = await PerplexityTask("text", TEXT, window=WINDOW).score(subject, limit=None, on_item=no_progress)
    np.testing.assert_allclose(found[:, 0], direct_nats(bos_checkpoint, [begin]), rtol=1e-4)
    assert set(found[:, 1]) == {WINDOW - 1}


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_loaded_model_agrees_with_transformers(checkpoint: Callable[[str], Path], family: str) -> None:
    path = checkpoint(family)
    model = load_model(path, dtype="float32")
    cut = cut_windows(TEXT, Tokenizer.load(path), window=WINDOW)
    expected = direct_nats(path, [])
    np.testing.assert_allclose(window_nats(model, cut.windows), expected, rtol=1e-4)
    assert perplexity(model, cut) == pytest.approx(math.exp(sum(expected) / (len(expected) * (WINDOW - 1))), rel=1e-4)


async def test_a_window_may_be_as_long_as_the_model_holds_and_no_longer(
    checkpoint: Callable[[str], Path], open_subject: OpenSubject, no_progress: Callable[[int, int], None]
) -> None:
    async with open_subject(checkpoint("qwen2")) as subject:
        most = subject.client.model().max_model_tokens
        found = await PerplexityTask("text", TEXT, window=most).score(subject, limit=1, on_item=no_progress)
        assert found[0, 1] == most - 1
        with pytest.raises(InvalidSetting, match="lower --window"):
            await PerplexityTask("text", TEXT, window=most + 1).score(subject, limit=1, on_item=no_progress)


def test_windows_lie_side_by_side_and_the_rest_is_left_out(checkpoint: Callable[[str], Path]) -> None:
    tokenizer = Tokenizer.load(checkpoint("qwen2"))
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    cut = cut_windows(TEXT, tokenizer, window=100)
    assert [token_id for window in cut.windows for token_id in window] == ids[: len(ids) // 100 * 100]
    assert cut.num_text_tokens == len(ids)
    with pytest.raises(InvalidSetting, match=r"5 tokens.*lower --window to 5"):
        cut_windows("short", tokenizer, window=100)
