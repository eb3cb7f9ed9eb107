"""How far two loaded models are apart, beside the definitions written out in numpy on whole logits."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from penstock.errors import InvalidSetting
from penstock.eval import closeness, cut_windows, report_closeness
from penstock.models.decoder import load_model
from penstock.text import Tokenizer
from tests.eval.conftest import TEXT
from tests.tiny_models import reference, reference_logits


@pytest.fixture
def noisy(checkpoint: Callable[[str], Path], tmp_path: Path) -> Path:
    """The tiny qwen2 with noise on its last layer."""
    path = checkpoint("qwen2")
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    torch.manual_seed(1)
    with torch.no_grad():
        weight = model.model.layers[-1].mlp.down_proj.weight
        weight += 0.1 * torch.randn_like(weight)
    model.save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((path / name).read_bytes())
    return tmp_path


def test_divergence_and_agreement_are_the_definitions(checkpoint: Callable[[str], Path], noisy: Path) -> None:
    path = checkpoint("qwen2")
    # More rows than are taken at once.
    windows = cut_windows(TEXT, Tokenizer.load(path), window=300).windows
    found = closeness(load_model(noisy), load_model(path), windows)
    for row, window in zip(found.items, windows, strict=True):
        p = torch.log_softmax(reference_logits(path, list(window))[:-1].double(), -1)
        q = torch.log_softmax(reference_logits(noisy, list(window))[:-1].double(), -1)
        kl = float((p.exp() * (p - q)).sum())
        agree = int((p.argmax(-1) == q.argmax(-1)).sum())
        assert kl > 1
        np.testing.assert_allclose(row, [kl, agree, len(window) - 1], rtol=1e-3)
    report = report_closeness("text", found)
    assert report.num_tokens == sum(len(window) - 1 for window in windows)
    assert report.kl.value == pytest.approx(found.items[:, 0].sum() / report.num_tokens)


@torch.no_grad()
def test_errors_are_relative_and_begin_at_the_layer_that_differs(
    checkpoint: Callable[[str], Path], noisy: Path
) -> None:
    path = checkpoint("qwen2")
    window = cut_windows(TEXT, Tokenizer.load(path), window=64).windows[0]
    errors = closeness(load_model(noisy), load_model(path), [window]).layer_errors
    assert errors is not None
    first, last, final = errors
    assert first == 0
    ours, theirs = (
        reference(one).model(torch.tensor([window]), output_hidden_states=True).last_hidden_state
        for one in (noisy, path)
    )
    assert final == pytest.approx(float((ours - theirs).norm() / theirs.norm()), rel=1e-3)
    assert last > 0.01


@pytest.mark.parametrize("family", ["qwen2", "gpt-neox"])
def test_a_model_is_exactly_itself(checkpoint: Callable[[str], Path], family: str) -> None:
    path = checkpoint(family)
    windows = cut_windows(TEXT, Tokenizer.load(path), window=64).windows[:2]
    model = load_model(path)
    found = closeness(model, load_model(path), windows)
    assert found.items[:, 0].tolist() == [0.0, 0.0]
    assert (found.items[:, 1] == found.items[:, 2]).all()
    assert found.layer_errors is not None
    assert len(found.layer_errors) >= model.config.num_layers
    assert not any(found.layer_errors)


def test_other_vocabularies_and_windows_too_long_are_refused(checkpoint: Callable[[str], Path]) -> None:
    model = load_model(checkpoint("qwen2"))
    with pytest.raises(InvalidSetting, match="lower --window"):
        closeness(model, model, [list(range(2)) * 400])
