"""Weights that are packed before a model asks for them."""

import json
import shutil
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from penstock.errors import ModelUnreadable
from penstock.kernels import QUANTIZATIONS, CPUOps
from penstock.models import read_config
from penstock.models.ahead import Ahead
from penstock.models.decoder import load_model
from tests.kernels.backends import needs_native
from tests.packing import layout_of
from tests.tiny_models import FAMILIES, VOCAB_SIZE

TOKENS = torch.arange(20) % VOCAB_SIZE


def _begin(path: Path, *, quantize: str | None = None, adaptable: bool = False, most_bytes: int = 1 << 40) -> Ahead:
    return Ahead(path, dtype="float32", quantize=quantize, adaptable=adaptable, num_threads=2, most_bytes=most_bytes)


def _logits(path: Path, ops: CPUOps, *, adaptable: bool = False, ahead: Ahead | None = None) -> Tensor:
    model = load_model(path, dtype="float32", ops=ops, adaptable=adaptable, ahead=ahead)
    hidden = model.forward(TOKENS, layout_of([20], [20], [[0, 1]], 16), model.new_cache(2, 16))
    return model.logits(hidden)


@needs_native
@pytest.mark.parametrize(("quantize", "adaptable"), [(None, False), ("int8", True)])
@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_what_is_begun_is_what_a_family_asks_for(
    family: str, quantize: str | None, adaptable: bool, checkpoint: Callable[[str], Path]
) -> None:
    path = checkpoint(family)
    ops = CPUOps(QUANTIZATIONS[quantize] if quantize else None)
    expected = _logits(path, ops, adaptable=adaptable)
    with closing(_begin(path, quantize=quantize, adaptable=adaptable)) as ahead:
        assert ahead.packed is not None
        # At least its head and two products a layer: what is brought into another order first is not begun.
        assert len(ahead.packed) > 2 * read_config(path).num_layers
        found = _logits(path, replace(ops, ahead=ahead.packed), adaptable=adaptable, ahead=ahead)
        assert len(ahead.packed) == 0
    assert torch.equal(found, expected)


@needs_native
@torch.inference_mode()
def test_a_wrong_guess_changes_nothing(checkpoint: Callable[[str], Path]) -> None:
    path = checkpoint("llama")
    with closing(_begin(path, quantize="int8")) as ahead:
        assert ahead.packed is not None
        num_begun = len(ahead.packed)
        assert torch.equal(_logits(path, CPUOps(ahead=ahead.packed), ahead=ahead), _logits(path, CPUOps()))
        assert len(ahead.packed) == num_begun


@torch.inference_mode()
def test_whoever_loads_says_what_is_wrong(tmp_path: Path, checkpoint: Callable[[str], Path]) -> None:
    path = tmp_path / "model"
    shutil.copytree(checkpoint("llama"), path)
    file = path / "model.safetensors"
    whole = file.read_bytes()
    for data, message in ((whole[:-4], "broken or cut short"), (b"\xff" * 9, "broken"), (b"", "broken")):
        file.write_bytes(data)
        with closing(_begin(path)) as ahead:
            assert ahead.packed is None
            with pytest.raises(ModelUnreadable, match=message):
                load_model(path, ahead=ahead)
    file.unlink()
    with closing(_begin(path)) as ahead, pytest.raises(ModelUnreadable, match="no weights"):
        load_model(path, ahead=ahead)


@torch.inference_mode()
def test_a_missing_tensor_is_said(tmp_path: Path, checkpoint: Callable[[str], Path]) -> None:
    path = tmp_path / "model"
    shutil.copytree(checkpoint("llama"), path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": config["num_hidden_layers"] + 1}))
    with closing(_begin(path)) as ahead, pytest.raises(ModelUnreadable, match=r"has no tensor model\.layers"):
        load_model(path, dtype="float32", ahead=ahead)


def test_nothing_is_begun_of_what_may_not_fit(checkpoint: Callable[[str], Path]) -> None:
    with closing(_begin(checkpoint("llama"), most_bytes=1000)) as ahead:
        assert ahead.packed is None
        assert not ahead.weights
