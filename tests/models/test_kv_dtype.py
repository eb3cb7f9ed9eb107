"""Caches in every dtype beside weights in every other: the native model is the reference's, and near the exact one."""

import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from penstock.errors import InvalidSetting
from penstock.kernels import Ops, ReferenceOps, ops_for
from penstock.kernels.dtypes import dtype_name
from penstock.kernels.native import IN_PAIRS, NATIVE
from penstock.models import resolve_model
from penstock.models.decoder import KV_DTYPES, load_model
from penstock.models.model import LanguageModel
from penstock.text import Tokenizer
from tests.packing import layout_of
from tests.tiny_models import make_checkpoint

needs_native = pytest.mark.skipif(NATIVE is None, reason="the native kernels were not built")


@torch.inference_mode()
def logits(model: LanguageModel, token_ids: list[int]) -> torch.Tensor:
    """Return [T, V] of one sequence: a prompt in two chunks, so that the second reads what the first wrote."""
    T, first = len(token_ids), len(token_ids) // 2
    table = list(range(-(-T // 16)))
    cache, ids = model.new_cache(len(table), 16), torch.tensor(token_ids)
    hidden = [
        model.forward(ids[begin:end], layout_of([end - begin], [end], [table], 16), cache)
        for begin, end in ((0, first), (first, T))
    ]
    return model.logits(torch.cat(hidden))


@needs_native
@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral"])
def test_native_equals_the_reference(family: str, dtype: str, kv_dtype: str, tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, family, dtype=getattr(torch, dtype))
    token_ids = [(7 * i) % 250 for i in range(90)]
    found = load_model(path, dtype=dtype, kv_dtype=kv_dtype)
    # Weights in float32 are the same ones, and activations are float32 on both sides, unless multiplied in pairs.
    expected = load_model(path, dtype="float32", kv_dtype=kv_dtype, ops=ReferenceOps())
    assert {dtype_name(tensor.dtype) for kv in found.new_cache(1, 16) for tensor in (kv.k, kv.v)} == {kv_dtype}
    # Of logits of up to 20. A last bit decides to which of two neighbours a key is rounded.
    tolerance = {"float32": 1e-4, "bfloat16": 1e-1, "int8": 1e-1}[kv_dtype]
    if dtype == "bfloat16" and ops_for("bfloat16").name in IN_PAIRS:
        tolerance = 0.3
    torch.testing.assert_close(logits(found, token_ids), logits(expected, token_ids), atol=tolerance, rtol=0)


@pytest.mark.parametrize("ops", [None, ReferenceOps()], ids=["fastest", "reference"])
def test_the_demo_model_hardly_notices_codes_of_8_bits(ops: Ops | None) -> None:
    path = resolve_model("penstock-mini")
    source = Path(textwrap.__file__).read_text()
    token_ids = Tokenizer.load(path).encode(source, add_special_tokens=False)[:512]
    exact = logits(load_model(path, dtype="float32", ops=ops), token_ids)
    coarse = logits(load_model(path, dtype="float32", kv_dtype="int8", ops=ops), token_ids)
    # Logits whose standard deviation is 2.9 move by 0.024; bfloat16 moves them by 0.007.
    off = (coarse - exact).abs()
    assert 1e-3 < off.pow(2).mean().sqrt() < 0.05
    assert off.max() < 1.0
    divergence = F.kl_div(coarse.log_softmax(-1), exact.log_softmax(-1), log_target=True, reduction="batchmean")
    assert divergence < 1e-3
    assert (coarse.argmax(-1) == exact.argmax(-1)).float().mean() > 0.97


def test_an_unknown_dtype_is_named(checkpoint: Callable[[str], Path]) -> None:
    with pytest.raises(InvalidSetting, match="kv_dtype is 'int3'; it can be auto, float32, bfloat16, int8"):
        load_model(checkpoint("llama"), kv_dtype="int3")


def test_dtypes_have_short_names(checkpoint: Callable[[str], Path]) -> None:
    model = load_model(checkpoint("llama"), dtype="fp32", kv_dtype="bf16")
    assert (model.dtype, model.kv_dtype) == ("float32", "bfloat16")


def test_auto_is_the_weights_dtype(checkpoint: Callable[[str], Path]) -> None:
    assert load_model(checkpoint("llama"), dtype="bfloat16").kv_dtype == "bfloat16"
    assert load_model(checkpoint("llama"), dtype="float32").kv_dtype == "float32"
