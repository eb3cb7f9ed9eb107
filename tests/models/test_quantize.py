"""Weights kept in codes: the model is the one whose weights, or activations too, were rounded, and nothing else."""

import textwrap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from penstock.errors import InvalidSetting, KernelUnsupported
from penstock.kernels import QUANTIZATIONS, CPUOps, Linear, Quantization, ReferenceOps, Stacked, WeightCodes, ops_for
from penstock.kernels.linear.cpu import PackedLinear
from penstock.kernels.linear.reference import ReferenceLinear, round_activations
from penstock.kernels.native import NATIVE
from penstock.models import resolve_model
from penstock.models.decoder import load_model
from penstock.models.model import LanguageModel
from penstock.text import Tokenizer
from tests.engines import build_engine, greedy, run_to_end, tokens_of
from tests.packing import layout_of

needs_native = pytest.mark.skipif(NATIVE is None, reason="the native kernels were not built")


class RoundedLinear:
    """What codes stand for, multiplied plainly with what activations are rounded to."""

    def __init__(self, form: Quantization, weight: Tensor, bias: Tensor | None) -> None:
        exact = replace(form, int8_activations=False)
        self._weight = PackedLinear(weight, None, quantization=exact)(torch.eye(weight.shape[1])).T.double()
        self._bias = None if bias is None else bias.double()
        self._round = round_activations if form.int8_activations else Tensor.double

    def __call__(self, x: Tensor, added: Tensor | None = None) -> Tensor:
        out = F.linear(self._round(x), self._weight, self._bias).float()
        return out if added is None else out + added


class RoundedOps(ReferenceOps):
    """The reference with linear layers of a ``form``."""

    def __init__(self, form: Quantization) -> None:
        self._form = form

    def prepare_linear(  # type: ignore[override]
        self,
        weight: Tensor | Stacked | WeightCodes,
        bias: Tensor | None,
        *,
        exact: bool = False,
        activation: str | None = None,
    ) -> Linear:
        weight = weight.joined() if isinstance(weight, Stacked) else weight
        assert isinstance(weight, Tensor)
        assert activation is None
        return ReferenceLinear(weight, bias) if exact else RoundedLinear(self._form, weight, bias)

    def prepare_gated_linear(  # type: ignore[override]
        self,
        gate: Tensor | WeightCodes,
        up: Tensor | WeightCodes,
        gate_bias: Tensor | None,
        up_bias: Tensor | None,
        *,
        activation: str = "silu",
    ) -> Linear:
        assert activation == "silu"
        assert isinstance(gate, Tensor)
        assert isinstance(up, Tensor)
        gates, ups = RoundedLinear(self._form, gate, gate_bias), RoundedLinear(self._form, up, up_bias)

        def product(x: Tensor, added: Tensor | None = None) -> Tensor:
            assert added is None
            return F.silu(gates(x)) * ups(x)

        return product


@torch.inference_mode()
def logits(model: LanguageModel, token_ids: list[int]) -> torch.Tensor:
    """Return [T, V] of one sequence."""
    num_blocks = -(-len(token_ids) // 16)
    layout = layout_of([len(token_ids)], [len(token_ids)], [list(range(num_blocks))], 16)
    hidden = model.forward(torch.tensor(token_ids), layout, model.new_cache(num_blocks, 16))
    return model.logits(hidden)


@needs_native
@pytest.mark.parametrize("quantize", QUANTIZATIONS)
@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral-full", "mixtral"])
def test_quantized_is_the_model_of_rounded_values(
    family: str, quantize: str, checkpoint: Callable[[str], Path]
) -> None:
    path, form = checkpoint(family), QUANTIZATIONS[quantize]
    token_ids = [(7 * i) % 250 for i in range(50)]
    found = logits(load_model(path, ops=CPUOps(form)), token_ids)
    expected = logits(load_model(path, ops=RoundedOps(form)), token_ids)
    # Where activations are rounded, a sum taken in another order may fall to the other side of a half.
    assert (found - expected).norm() < expected.norm() * (1e-2 if form.int8_activations else 1e-5)
    assert torch.equal(found.argmax(-1), expected.argmax(-1))
    # And it is not the model as it was: a setting that did nothing would pass the above on coarse weights.
    exact = logits(load_model(path, ops=ReferenceOps()), token_ids)
    assert (found - exact).norm() > (found - expected).norm() * 2


@needs_native
@pytest.mark.parametrize("quantize", QUANTIZATIONS)
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_greedy_tokens_are_the_references(family: str, quantize: str, checkpoint: Callable[[str], Path]) -> None:
    path, form = checkpoint(family), QUANTIZATIONS[quantize]
    requests = [greedy(f"r{i}", [(7 * j + 31 * i) % 250 for j in range(5 + 20 * i)], 24) for i in range(4)]
    found = run_to_end(build_engine(path, ops=CPUOps(form)), requests)
    expected = run_to_end(build_engine(path, ops=RoundedOps(form)), requests)
    for request in requests:
        assert tokens_of(found[request.request_id]) == tokens_of(expected[request.request_id])


@needs_native
@pytest.mark.parametrize(
    ("quantize", "most"), [(None, 0.008), ("w8a16", 0.04), ("int8", 0.07), ("w4a16", 0.35), ("int4", 0.35)]
)
def test_the_demo_models_logits_stay_near(quantize: str | None, most: float) -> None:
    path = resolve_model("penstock-mini")
    token_ids = Tokenizer.load(path).encode(Path(textwrap.__file__).read_text(), add_special_tokens=False)[:512]
    exact = logits(load_model(path, dtype="float32", ops=ReferenceOps()), token_ids)
    found = logits(load_model(path, dtype="bfloat16", ops=ops_for("bfloat16", quantize)), token_ids)
    # Without what all of a token's logits have in common, which changes nothing.
    exact, found = (x - x.mean(-1, keepdim=True) for x in (exact, found))
    assert most / 10 < (found - exact).norm() / exact.norm() < most


@needs_native
@pytest.mark.parametrize("quantize", QUANTIZATIONS)
def test_neighbours_change_no_bit_of_a_quantized_model(quantize: str, checkpoint: Callable[[str], Path]) -> None:
    model = load_model(checkpoint("llama"), ops=CPUOps(QUANTIZATIONS[quantize]))
    sequences = [[(7 * i + s) % 250 for i in range(3 + 5 * s)] for s in range(12)]
    lens = [len(sequence) for sequence in sequences]
    with torch.inference_mode():
        cache = model.new_cache(4 * len(sequences), 16)
        layout = layout_of(lens, lens, [list(range(4 * s, 4 * s + 4)) for s in range(len(sequences))], 16)
        token_ids = torch.tensor([token_id for sequence in sequences for token_id in sequence])
        together = model.logits(model.forward(token_ids, layout, cache))
    for found, sequence in zip(torch.split(together, lens), sequences, strict=True):
        assert torch.equal(found, logits(model, sequence))


def test_an_unknown_precision_is_named() -> None:
    with pytest.raises(InvalidSetting, match="quantize is 'int3'; it can be int8, int4, w8a16, w4a16"):
        ops_for("float32", "int3")


def test_what_native_kernels_do_not_read_cannot_be_quantized() -> None:
    with pytest.raises(KernelUnsupported, match="--dtype bfloat16"):
        ops_for("float16", "int8")
