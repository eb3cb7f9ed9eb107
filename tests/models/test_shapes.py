"""Random weights of published shapes: the right sizes, and numbers as tame as a trained model's."""

import pytest
import torch

from penstock.errors import ModelUnreadable
from penstock.kernels import ReferenceOps
from penstock.models import SHAPES, find_shape
from penstock.models.random_weights import RandomWeights, count_random_parameters, make_random_model
from tests.packing import layout_of

PUBLISHED_PARAMETERS = {
    "llama-0.1b": 100_092_672,
    "smollm2-135m": 134_515_008,
    "qwen2.5-0.5b": 494_032_768,
    "qwen3-0.6b": 596_049_920,
    "llama-3.2-1b": 1_235_814_400,
    "qwen2.5-1.5b": 1_543_714_304,
    "mistral-7b": 7_248_023_552,
    "llama-3.1-8b": 8_030_261_248,
}


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_has_as_many_parameters_as_its_model(name: str) -> None:
    assert count_random_parameters(SHAPES[name]) == PUBLISHED_PARAMETERS[name]


def test_names_of_shapes() -> None:
    assert find_shape("shape:qwen3-0.6b") is SHAPES["qwen3-0.6b"]
    assert find_shape("penstock-mini") is None
    with pytest.raises(ModelUnreadable, match=r"no shape 'qwen9'; there are .*qwen2\.5-0\.5b"):
        find_shape("shape:qwen9")


def test_tensors_depend_on_their_names_and_have_no_two_rows_alike() -> None:
    weights = RandomWeights()
    matrix = weights.take("a.weight", (5000, 896), "bfloat16")
    assert torch.equal(matrix, RandomWeights().take("a.weight", (5000, 896), "bfloat16"))
    assert not torch.equal(matrix, weights.take("b.weight", (5000, 896), "bfloat16"))
    assert len(torch.unique(matrix[:, :8], dim=0)) == 5000
    assert matrix.float().std().item() == pytest.approx(896**-0.5, rel=0.01)
    assert weights.take("norm.weight", (8,), "float32").tolist() == [1.0] * 8
    assert weights.take("q_proj.bias", (8,), "float32").tolist() == [0.0] * 8


@torch.inference_mode()
def test_activations_neither_vanish_nor_explode() -> None:
    model = make_random_model(SHAPES["smollm2-135m"], "float32", "float32", ReferenceOps())
    layout = layout_of([12], [12], [[0]], 16)
    hidden = model.forward(torch.arange(12) * 4001, layout, model.new_cache(1, 16))
    logits = model.logits(hidden)
    assert 0.5 < logits.std().item() < 2
    assert len(set(logits.argmax(-1).tolist())) > 6, "different tokens have different likeliest successors"
