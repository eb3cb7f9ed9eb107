"""Every native family against transformers on tiny random weights."""

from array import array
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from penstock.kernels import ops_for
from penstock.kernels.dtypes import dtype_name
from penstock.models.decoder import load_model
from tests.kernels.backends import needs_native
from tests.packing import layout_of
from tests.tiny_models import EVERY, FAMILIES, VOCAB_SIZE, make_checkpoint, reference_logits

BLOCK = 4


def _prompt(length: int, seed: int = 3) -> list[int]:
    return torch.randint(0, VOCAB_SIZE, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize("family", EVERY)
@pytest.mark.parametrize("length", [1, 7, 60])
@torch.inference_mode()
def test_logits_equal_transformers(family: str, length: int, checkpoint: Callable[[str], Path]) -> None:
    path = checkpoint(family)
    model = load_model(path, dtype="float32", max_tokens=length)
    token_ids = _prompt(length)
    blocks = list(range(-(-length // BLOCK)))
    cache = model.new_cache(len(blocks), BLOCK)
    hidden = model.forward(torch.tensor(token_ids), layout_of([length], [length], [blocks], BLOCK), cache)
    torch.testing.assert_close(model.logits(hidden), reference_logits(path, token_ids), atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", EVERY)
@torch.inference_mode()
def test_chunks_and_single_tokens_give_the_same_logits(family: str, checkpoint: Callable[[str], Path]) -> None:
    path = checkpoint(family)
    model = load_model(path, dtype="float32")
    token_ids = _prompt(60)
    expected = reference_logits(path, token_ids)
    # Blocks out of order, and one more that belongs to nobody.
    blocks = [(7 * i + 3) % 16 for i in range(15)]
    cache = model.new_cache(17, BLOCK)
    done = 0
    for chunk in [13, 1, 1, 20, 1, 24]:
        end = done + chunk
        layout = layout_of([chunk], [end], [blocks[: -(-end // BLOCK)]], BLOCK)
        hidden = model.forward(torch.tensor(token_ids[done:end]), layout, cache)
        torch.testing.assert_close(model.logits(hidden), expected[done:end], atol=1e-4, rtol=0)
        done = end


# What takes torch between the native ops: experts are chosen by it, and dynamic angles made.
NOT_RECORDED = {"mixtral", "qwen3-moe", "qwen3-moe-sparse", "qwen3-moe-unnormalized", "llama-dynamic"}


@needs_native
@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_a_recorded_pass_gives_the_same_bits(family: str, checkpoint: Callable[[str], Path]) -> None:
    model = load_model(checkpoint(family), dtype="float32")
    cache, other_cache = model.new_cache(17, BLOCK), model.new_cache(17, BLOCK)
    replay = model.replay(cache, BLOCK)
    assert replay is not None
    token_ids = _prompt(60)
    for first, end in ((0, 50), (50, 51), (51, 55)):
        some, blocks = token_ids[first:end], list(range(-(-end // BLOCK)))
        hidden = replay(some, [len(some)], [end], [array("i", blocks)], [0])
        assert (hidden is None) == (family in NOT_RECORDED)
        if hidden is not None:
            layout = layout_of([len(some)], [end], [blocks], BLOCK)
            assert torch.equal(torch.from_numpy(hidden), model.forward(torch.tensor(some), layout, other_cache))


@needs_native
@pytest.mark.parametrize("quantize", [None, "int8"])
@pytest.mark.parametrize("family", EVERY)
@torch.inference_mode()
def test_rows_alone_have_the_bits_that_they_have_among_all(
    family: str, quantize: str | None, checkpoint: Callable[[str], Path]
) -> None:
    model = load_model(checkpoint(family), dtype="float32", ops=ops_for("float32", quantize))
    cache, token_ids = model.new_cache(17, BLOCK), torch.tensor(_prompt(30))
    layout = layout_of([17, 1, 12], [17, 1, 12], [[0, 1, 2, 3, 4], [5], [6, 7, 8]], BLOCK)
    hidden = model.forward(token_ids, layout, cache)
    for rows in ([16, 17, 29], [29, 29, 0], []):
        some = model.forward(token_ids, layout, cache, rows=torch.tensor(rows, dtype=torch.int64))
        assert torch.equal(some, hidden[rows])


def test_a_window_needs_only_its_own_blocks(checkpoint: Callable[[str], Path]) -> None:
    path = checkpoint("mistral")
    with torch.inference_mode():
        model = load_model(path, dtype="float32")
        token_ids = _prompt(60)
        cache = model.new_cache(16, BLOCK)
        model.forward(torch.tensor(token_ids[:59]), layout_of([59], [59], [list(range(15))], BLOCK), cache)
        # Positions 36..59 are visible from the last one: nine blocks have slid out and may hold anything.
        for kv in cache:
            kv.k.numpy()[:9], kv.v.numpy()[:9] = np.nan, np.nan
        layout = layout_of([1], [60], [list(range(9, 15))], BLOCK, starts=[36])
        hidden = model.forward(torch.tensor(token_ids[59:]), layout, cache)
    torch.testing.assert_close(model.logits(hidden)[0], reference_logits(path, token_ids)[-1], atol=1e-4, rtol=0)


@needs_native
@pytest.mark.parametrize("family", ["llama", "olmo2", "gemma2", "phi3-partial", "mixtral", "qwen3-moe"])
@torch.inference_mode()
def test_no_bit_depends_on_neighbours(family: str, checkpoint: Callable[[str], Path]) -> None:
    model = load_model(checkpoint(family), dtype="float32")
    lengths = [1, 30, 7, 1, 19]
    prompts = [_prompt(length, seed) for seed, length in enumerate(lengths)]
    tables = [list(range(8 * i, 8 * i + 8)) for i in range(len(lengths))]

    def hidden(chosen: list[int]) -> torch.Tensor:
        sizes = [lengths[i] for i in chosen]
        layout = layout_of(sizes, sizes, [tables[i] for i in chosen], BLOCK)
        token_ids = torch.tensor([token_id for i in chosen for token_id in prompts[i]])
        return model.logits(model.forward(token_ids, layout, model.new_cache(40, BLOCK)))

    together = torch.split(hidden([0, 1, 2, 3, 4]), lengths)
    for i, expected in enumerate(together):
        assert torch.equal(hidden([i]), expected)


@pytest.mark.parametrize("max_tokens", [32, 33])
@torch.inference_mode()
def test_longrope_stretches_where_longer_sequences_may_come(max_tokens: int, checkpoint: Callable[[str], Path]) -> None:
    path = checkpoint("phi3-long")
    model = load_model(path, dtype="float32", max_tokens=max_tokens)
    token_ids = _prompt(max_tokens)
    layout = layout_of([20], [20], [list(range(5))], BLOCK)
    hidden = model.forward(torch.tensor(token_ids[:20]), layout, model.new_cache(5, BLOCK))
    # transformers takes the divisors that the whole sequence asks for; so its first 20 tokens are those of all 33.
    expected = reference_logits(path, token_ids)[:20]
    torch.testing.assert_close(model.logits(hidden), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.inference_mode()
def test_half_precision_checkpoints_widen_exactly(dtype: torch.dtype, tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, "llama", dtype=dtype)
    model = load_model(path, dtype="float32")
    token_ids = _prompt(20)
    hidden = model.forward(
        torch.tensor(token_ids), layout_of([20], [20], [list(range(5))], BLOCK), model.new_cache(5, BLOCK)
    )
    torch.testing.assert_close(model.logits(hidden), reference_logits(path, token_ids), atol=1e-4, rtol=0)
    assert load_model(path, dtype=dtype_name(dtype)).dtype == dtype_name(dtype)


def test_sharded_checkpoints_load(tmp_path: Path) -> None:
    single = load_model(make_checkpoint(tmp_path / "single"))
    path = make_checkpoint(tmp_path / "sharded", max_shard_size="100KB")
    assert len(list(path.glob("*.safetensors"))) > 1
    assert load_model(path).num_parameters == single.num_parameters
