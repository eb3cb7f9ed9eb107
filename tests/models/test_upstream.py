"""What transformers' code runs over our cache, and what it must not."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from penstock.errors import MissingExtra, ModelUnreadable
from penstock.kernels import QUANTIZATIONS, CPUOps, ReferenceOps
from penstock.models import read_config, upstream
from penstock.models.decoder import load_model
from tests.kernels.backends import needs_native
from tests.packing import layout_of
from tests.tiny_models import SHAPE, make_checkpoint, reference_logits, write_tokenizer


def write_model(path: Path, name: str, head: str = "ForCausalLM", **settings: Any) -> Path:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**SHAPE, **settings})
    model = getattr(transformers, name + head)(config)
    model.save_pretrained(path)
    write_tokenizer(path)
    return path


def test_sizes_are_those_a_forward_pass_shows(checkpoint: Callable[[str], Path]) -> None:
    config = read_config(checkpoint("cohere2"))
    assert not config.is_native
    assert (config.num_heads, config.num_kv_heads, config.head_dim, config.vocab_size) == (4, 2, 16, 320)
    assert [layer.window for layer in config.layers] == [24, 24, 24, None]
    assert config.max_positions == 512
    assert config.eos_token_ids == (258,)


def test_without_the_extra_it_is_named(checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream, "find_spec", lambda name: None)
    with pytest.raises(
        MissingExtra, match=r"GPTNeoXForCausalLM is not native; .* pip install 'penstock\[transformers\]'"
    ):
        read_config(checkpoint("gpt-neox"))


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        # A sink in each softmax; scores with a bias; state beside the cache.
        ("GptOss", {"num_local_experts": 2, "num_experts_per_tok": 1}, "is not itself over a paged cache"),
        ("Bloom", {}, "do not all attend alike"),
        ("Mamba", {}, "do not all attend alike"),
        ("Lfm2", {"layer_types": ["conv", "full_attention"]}, "do not all attend alike"),
    ],
)
def test_what_keeps_or_adds_something_is_refused(
    name: str, settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = write_model(tmp_path, name, **settings)
    with pytest.raises(ModelUnreadable, match=message):
        load_model(path)


def test_an_encoder_is_refused(tmp_path: Path) -> None:
    path = write_model(tmp_path, "Bert", "ForMaskedLM")
    with pytest.raises(ModelUnreadable):
        load_model(path)


def test_angles_that_depend_on_the_batch_are_refused(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, "stablelm")
    config = json.loads((path / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelUnreadable, match="rope_type is 'dynamic'"):
        read_config(path)


def test_missing_weights_are_an_error(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, "gpt-neox")
    (path / "model.safetensors").unlink()
    with pytest.raises(ModelUnreadable, match="cannot be loaded"):
        load_model(path)


@needs_native
@pytest.mark.parametrize("quantize", [None, "int8"])
@torch.inference_mode()
def test_projections_are_ours(quantize: str | None, checkpoint: Callable[[str], Path]) -> None:
    path = checkpoint("stablelm")
    token_ids = [(7 * i) % 250 for i in range(30)]
    layout = layout_of([30], [30], [[0, 1]], 16)

    def logits(model: Any) -> torch.Tensor:
        found: torch.Tensor = model.logits(model.forward(torch.tensor(token_ids), layout, model.new_cache(2, 16)))
        return found

    native = logits(load_model(path, ops=CPUOps(QUANTIZATIONS[quantize] if quantize else None)))
    plain = logits(load_model(path, ops=ReferenceOps()))
    expected = reference_logits(path, token_ids)
    torch.testing.assert_close(plain, expected, atol=1e-4, rtol=0)
    difference = float((native - expected).abs().max())
    assert difference < 1e-4 if quantize is None else 1e-3 < difference < 1


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@torch.inference_mode()
def test_half_precision(dtype: str, checkpoint: Callable[[str], Path]) -> None:
    path = checkpoint("gpt-neox")
    model = load_model(path, dtype=dtype)
    hidden = model.forward(torch.arange(20), layout_of([20], [20], [[0, 1]], 16), model.new_cache(2, 16))
    expected = reference_logits(path, list(range(20)))
    assert float((model.logits(hidden) - expected).abs().mean() / expected.std()) < 0.05
