"""Adapters give what the model with them merged in gives."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from penstock.errors import InvalidSetting, ModelUnreadable
from penstock.models.decoder import load_model
from tests.adapters import ALL, merged, write_adapter
from tests.packing import layout_of
from tests.tiny_models import VOCAB_SIZE, reference_logits

ADAPTED = ["llama", "llama-tied-biases", "qwen3", "olmo2", "gemma2", "granite", "phi3-partial"]
TOKENS = torch.randint(0, VOCAB_SIZE, (30,), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", ADAPTED)
@torch.inference_mode()
def test_an_adapter_is_the_merged_model(family: str, checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    path = checkpoint(family)
    model = load_model(path, adaptable=True)
    settings: list[dict[str, Any]] = [
        {},
        {"rank": 6, "use_rslora": True},
        {"targets": ("v_proj", "up_proj", "qkv_proj")},
    ]
    paths = [write_adapter(tmp_path / f"{i}", path, seed=i, **more) for i, more in enumerate(settings)]
    adapters = [model.load_adapter(one) for one in paths]
    # All in one step, with the model as it is between them.
    sizes, rows = [30] * 4, torch.arange(30)
    layout = layout_of(sizes, sizes, [[2 * i, 2 * i + 1] for i in range(4)], 16)
    order = [adapters[0], None, adapters[1], adapters[2]]
    adapted = [(rows + 30 * i, adapter) for i, adapter in enumerate(order) if adapter is not None]
    hidden = model.forward(TOKENS.repeat(4), layout, model.new_cache(8, 16), adapted)
    found = torch.split(model.logits(hidden), 30)
    as_it_is = reference_logits(path, TOKENS.tolist())
    expected = [reference_logits(merged(tmp_path / f"m{i}", path, one), TOKENS.tolist()) for i, one in enumerate(paths)]
    for part, wanted in zip(found, [expected[0], as_it_is, expected[1], expected[2]], strict=True):
        torch.testing.assert_close(part, wanted, atol=2e-4, rtol=1e-4)
    for one in expected:
        assert (one - as_it_is).abs().max() > 0.05


@torch.inference_mode()
def test_an_adapter_of_a_model_that_sees(seeing_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    path = seeing_checkpoint("llava")
    one = write_adapter(tmp_path / "adapter", path, ("o_proj", "gate_proj", "down_proj"))
    model, expected = load_model(path, adaptable=True), load_model(merged(tmp_path / "merged", path, one))
    layout, rows = layout_of([30], [30], [[0, 1]], 16), torch.arange(30)
    found = model.forward(TOKENS, layout, model.new_cache(2, 16), [(rows, model.load_adapter(one))])
    plain = model.forward(TOKENS, layout, model.new_cache(2, 16))
    wanted = expected.forward(TOKENS, layout, expected.new_cache(2, 16))
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    assert (found - plain).abs().max() > 0.05
    of_tower = write_adapter(tmp_path / "tower", path, ("fc1",))
    with pytest.raises(ModelUnreadable, match="vision_tower"):
        model.load_adapter(of_tower)


@torch.inference_mode()
def test_room_for_adapters_changes_nothing(checkpoint: Callable[[str], Path]) -> None:
    for family in ("llama", "gemma2", "phi3-partial", "mixtral"):
        path = checkpoint(family)
        model = load_model(path, adaptable=True)
        hidden = model.forward(TOKENS, layout_of([30], [30], [[0, 1]], 16), model.new_cache(2, 16))
        expected = reference_logits(path, TOKENS.tolist())
        torch.testing.assert_close(model.logits(hidden), expected, atol=1e-4, rtol=0)


def damage_config(path: Path, **changes: Any) -> None:
    file = path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def damage_weights(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(path / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, path / "adapter_model.safetensors")


NAME = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: (path / "adapter_config.json").unlink(), r"adapter_config\.json is not a LoRA adapter's"),
        (lambda path: (path / "adapter_config.json").write_text("[]"), r"adapter_config\.json is not a LoRA adapter's"),
        (lambda path: damage_config(path, r="many"), "is not a LoRA adapter's"),
        (lambda path: damage_config(path, peft_type="IA3"), "its type is IA3"),
        (lambda path: damage_config(path, bias="all"), "its bias 'all'"),
        (lambda path: damage_config(path, use_dora=True), "use_dora is set, and Penstock runs plain LoRA"),
        (lambda path: damage_config(path, r=5), r"is \[4, 64\], and this model needs \[5, 64\]"),
        (lambda path: (path / "adapter_model.safetensors").write_bytes(b"x" * 9), r"safetensors cannot be read"),
        (lambda path: damage_weights(path, lambda tensors: tensors.pop(NAME)), "is missing, and this model needs"),
        (
            lambda path: damage_weights(path, lambda tensors: tensors.update({"lm_head.lora_A.weight": torch.ones(4)})),
            r"adapts lm_head\.lora_A\.weight, which is not one of the projections",
        ),
    ],
)
def test_what_cannot_be_loaded(
    damage: Callable[[Path], object], message: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    model = load_model(checkpoint("llama"), adaptable=True)
    path = write_adapter(tmp_path, checkpoint("llama"), ALL)
    damage(path)
    with pytest.raises(ModelUnreadable, match=message):
        model.load_adapter(path)


def test_families_in_transformers_code_have_no_room(checkpoint: Callable[[str], Path]) -> None:
    with pytest.raises(InvalidSetting, match="need a native family"):
        load_model(checkpoint("stablelm"), adaptable=True)
