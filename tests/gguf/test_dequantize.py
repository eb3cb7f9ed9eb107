"""Every format bit for bit as ggml's own reference has it."""

import gguf
import numpy as np
import pytest

from penstock.gguf.dequantize import FORMATS, dequantize


@pytest.mark.parametrize("number", FORMATS, ids=lambda number: FORMATS[number].name)
def test_any_bits_mean_what_ggml_says(number: int) -> None:
    form = FORMATS[number]
    kind = gguf.GGMLQuantizationType(number)
    assert (kind.name, *gguf.GGML_QUANT_SIZES[kind]) == (form.name, form.block_elements, form.block_bytes)
    # All bits random: scales that are infinite or not numbers too.
    data = np.random.default_rng(0).integers(0, 256, 600 * form.block_bytes, dtype=np.uint8)
    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(data.reshape(1, -1), kind).reshape(-1)
    found = dequantize(data, number)
    assert found.dtype == np.float32
    numbers = ~np.isnan(expected)
    assert numbers.sum() > len(expected) / 2
    assert np.array_equal(found[numbers].view(np.uint32), expected[numbers].view(np.uint32))
    assert np.isnan(found[~numbers]).all()


@pytest.mark.parametrize("number", [2, 8], ids=["Q4_0", "Q8_0"])
def test_chunks_change_nothing(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = np.random.default_rng(1).standard_normal((7, 32 * 50)).astype(np.float32)
    data = gguf.quants.quantize(weights, gguf.GGMLQuantizationType(number)).reshape(-1)
    whole = dequantize(data, number)
    monkeypatch.setattr("penstock.gguf.dequantize._CHUNK_BLOCKS", 3)
    assert np.array_equal(dequantize(data, number), whole)
    assert np.abs(whole - weights.reshape(-1)).max() < 0.4
