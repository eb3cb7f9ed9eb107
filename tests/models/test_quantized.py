"""Quantized checkpoints are the models that their codes stand for."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from penstock.errors import ModelUnreadable
from penstock.kernels import QUANTIZATIONS, CPUOps, Linear, Ops, ReferenceOps, Stacked, WeightCodes
from penstock.kernels.linear.reference import dequantize, round_activations
from penstock.models.decoder import count_parameters, load_model
from penstock.models.families import read_config
from penstock.quant import Scheme
from tests.kernels.backends import needs_native
from tests.packing import layout_of
from tests.quantized_files import SchemeOf, all_alike, quantize_checkpoint
from tests.tiny_models import make_checkpoint, reference_logits

TOKENS = [(11 * i + 5) % 256 for i in range(40)]
W4 = Scheme(bits=4, group=32)


@torch.inference_mode()
def logits(path: Path, ops: Ops | None = None, **options: Any) -> torch.Tensor:
    model = load_model(path, ops=ops, **options)
    hidden = model.forward(torch.tensor(TOKENS), layout_of([40], [40], [[0, 1, 2]], 16), model.new_cache(3, 16))
    return model.logits(hidden)


class CountedOps(CPUOps):
    """Native kernels that count how many products are with codes."""

    num_coded = 0
    num_floats = 0

    def prepare_linear(
        self,
        weight: torch.Tensor | Stacked | WeightCodes,
        bias: torch.Tensor | None,
        *,
        exact: bool = False,
        activation: str | None = None,
    ) -> Linear:
        self.count(weight, exact=exact)
        return super().prepare_linear(weight, bias, exact=exact, activation=activation)

    def prepare_gated_linear(self, gate: torch.Tensor | WeightCodes, *args: Any, **options: Any) -> Linear:
        self.count(gate)
        return super().prepare_gated_linear(gate, *args, **options)

    @classmethod
    def count(cls, weight: torch.Tensor | Stacked | WeightCodes, *, exact: bool = False) -> None:
        if isinstance(weight, WeightCodes):
            cls.num_coded += 1
        elif not exact:
            cls.num_floats += 1


@pytest.fixture
def counted() -> CountedOps:
    CountedOps.num_coded = CountedOps.num_floats = 0
    return CountedOps()


def mixed(module: str) -> Scheme | None:
    if "mlp" in module:
        return Scheme(bits=3, group=32, symmetric=False)
    return None if "layers.1" in module else Scheme(bits=8)


CASES: dict[str, tuple[str, str, SchemeOf]] = {
    "4 bits": ("llama", "compressed-tensors", all_alike(W4)),
    "4 bits with zeros": ("qwen2", "compressed-tensors", all_alike(replace(W4, symmetric=False))),
    "8 bits by outputs": ("qwen3", "compressed-tensors", all_alike(Scheme(bits=8))),
    "all, the head as well": ("gemma2", "compressed-tensors", lambda _: replace(W4, bits=5)),
    "some of each": ("llama-tied-biases", "compressed-tensors", mixed),
    "fused": ("phi3", "compressed-tensors", all_alike(replace(W4, symmetric=False))),
    "fused partly rotated": ("phi3-partial", "gptq", all_alike(W4)),
    "experts": ("mixtral", "gptq", all_alike(W4)),
    "experts beside others": ("qwen3-moe", "awq", all_alike(W4)),
    "gptq in order": ("llama", "gptq", all_alike(replace(W4, symmetric=False))),
    "gptq in order of activations": ("llama", "gptq_v2", all_alike(replace(W4, act_order=True))),
    "gptq of 2 bits": ("mistral", "gptq", all_alike(Scheme(bits=2, group=32, symmetric=False))),
    "gptq of 3 bits": ("olmo2", "gptq", all_alike(Scheme(bits=3, group=32))),
    "gptq of 8 bits by outputs": ("granite", "gptq_v2", all_alike(Scheme(bits=8, symmetric=False))),
    "gptq of some of each": ("llama-tied-biases", "gptq", mixed),
    "awq": ("smollm3", "awq", all_alike(replace(W4, symmetric=False))),
}


@needs_native
@pytest.mark.parametrize("case", CASES)
def test_codes_are_what_they_stand_for(case: str, tmp_path: Path, counted: CountedOps) -> None:
    family, layout, scheme_of = CASES[case]
    coded, plain = quantize_checkpoint(make_checkpoint(tmp_path / "made", family), tmp_path, scheme_of, layout)
    found = logits(coded, counted)
    # Exact but for the order of sums.
    torch.testing.assert_close(found, reference_logits(plain, TOKENS), atol=2e-4, rtol=0)
    assert counted.num_coded > 0
    # Nothing but what is in floats, such as the head, is multiplied by as floats.
    assert counted.num_floats == (3 if scheme_of is mixed else 0 if scheme_of("lm_head") else 1)
    # And where kernels have no codes, all is widened.
    torch.testing.assert_close(logits(coded, ReferenceOps()), found, atol=2e-4, rtol=0)


@pytest.mark.parametrize("adaptable", [False, True])
def test_groups_that_no_kernel_has_are_widened(adaptable: bool, tmp_path: Path, counted: CountedOps) -> None:
    checkpoint = make_checkpoint(tmp_path / "made", "llama")
    coded, plain = quantize_checkpoint(checkpoint, tmp_path, all_alike(Scheme(bits=4, group=16)))
    found = logits(coded, counted, adaptable=adaptable)
    torch.testing.assert_close(found, reference_logits(plain, TOKENS), atol=2e-4, rtol=0)
    assert counted.num_coded == 0


class RoundedCodes(ReferenceOps):
    """The reference over codes, with activations rounded where their form says so."""

    form_of_codes = CPUOps().form_of_codes

    def prepare_linear(  # type: ignore[override]
        self, weight: torch.Tensor | Stacked | WeightCodes, bias: torch.Tensor | None, **_: object
    ) -> Linear:
        plain = super().prepare_linear(weight, bias)
        if not isinstance(weight, WeightCodes):
            return plain
        assert weight.form.int8_activations
        exact_weight = dequantize(weight).double()

        def product(x: torch.Tensor, added: torch.Tensor | None = None) -> torch.Tensor:
            out = (round_activations(x, weight.inputs) @ exact_weight.T).float()
            return out if added is None else out + added

        return product

    def prepare_gated_linear(  # type: ignore[override]
        self,
        gate: torch.Tensor | WeightCodes,
        up: torch.Tensor | WeightCodes,
        gate_bias: torch.Tensor | None,
        up_bias: torch.Tensor | None,
        *,
        activation: str = "silu",
    ) -> Linear:
        gates, ups = self.prepare_linear(gate, None), self.prepare_linear(up, None)
        return lambda x, added=None: torch.nn.functional.silu(gates(x)) * ups(x)


@needs_native
@pytest.mark.parametrize("activations", ["dynamic", "static", "static with zeros"])
def test_activations_are_rounded_where_the_checkpoint_says_so(activations: str, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "made", "llama")
    scheme = Scheme(bits=8, activations=activations.split()[0], activation_zeros="zeros" in activations)
    coded, plain = quantize_checkpoint(checkpoint, tmp_path, lambda _: scheme)
    found, expected = logits(coded, CPUOps()), logits(coded, RoundedCodes())
    assert (found - expected).norm() < expected.norm() * 1e-2
    exact = reference_logits(plain, TOKENS)
    assert (found - exact).norm() > (found - expected).norm() * 2
    # Unless the operator says otherwise.
    torch.testing.assert_close(logits(coded, CPUOps(QUANTIZATIONS["w8a16"])), exact, atol=2e-4, rtol=0)


@needs_native
def test_quantize_goes_for_a_quantized_checkpoint(tmp_path: Path, counted: CountedOps) -> None:
    checkpoint = make_checkpoint(tmp_path / "made", "llama")
    coded, plain = quantize_checkpoint(checkpoint, tmp_path, all_alike(W4))
    exact = reference_logits(plain, TOKENS)
    # Codes of no more bits stay, so that all there is to see is the head's and the activations' rounding.
    for quantize in ("int8", "int4"):
        found = logits(coded, CPUOps(QUANTIZATIONS[quantize]))
        assert 1e-4 < (found - exact).norm() / exact.norm() < (0.3 if quantize == "int4" else 0.05)
    wide, wide_plain = quantize_checkpoint(checkpoint, tmp_path / "wide", all_alike(Scheme(bits=8)))
    narrow = logits(wide, CPUOps(QUANTIZATIONS["w4a16"]))
    torch.testing.assert_close(narrow, logits(wide_plain, CPUOps(QUANTIZATIONS["w4a16"])), atol=2e-4, rtol=0)


def test_the_plan_counts_codes(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "made", "llama")
    for layout in ("compressed-tensors", "gptq", "awq"):
        coded, plain = quantize_checkpoint(checkpoint, tmp_path / layout, all_alike(W4), layout)
        counts = count_parameters(coded, read_config(coded))
        assert sum(counts.values()) == load_model(coded).num_parameters == load_model(plain).num_parameters
        assert {scheme.bits for scheme in counts if scheme is not None} == {4}
        num_coded = 2 * (64 * (64 + 2 * 32) + 64 * 64 + 3 * 64 * 96)
        assert sum(count for scheme, count in counts.items() if scheme is not None) == num_coded


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    checkpoint = make_checkpoint(tmp_path / "made", "llama")
    return quantize_checkpoint(checkpoint, tmp_path, all_alike(W4))[0]


def change_config(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    config = json.loads((path / "config.json").read_text())
    change(config["quantization_config"])
    (path / "config.json").write_text(json.dumps(config))


def in_group(**changes: Any) -> Callable[[dict[str, Any]], None]:
    def change(config: dict[str, Any]) -> None:
        config["config_groups"]["group_0"] |= changes

    return change


def in_weights(**changes: Any) -> Callable[[dict[str, Any]], None]:
    def change(config: dict[str, Any]) -> None:
        config["config_groups"]["group_0"]["weights"] |= changes

    return change


def replaced(**values: Any) -> Callable[[dict[str, Any]], None]:
    def change(config: dict[str, Any]) -> None:
        config.clear()
        config.update(values)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (replaced(quant_method="fp8"), r"quantized \(fp8\).*serve the model's bf16 checkpoint, with --quantize"),
        (replaced(quant_method="bitsandbytes", bnb_4bit_quant_type="nf4"), r"quantized \(bitsandbytes\)"),
        (replaced(bits=4), "quant_method is not given"),
        (replaced(quant_method="gptq", bits=4, checkpoint_format="marlin"), "checkpoint_format is 'marlin'"),
        (replaced(quant_method="gptq", bits="four"), "bits is 'four', and Penstock reads an integer"),
        (replaced(quant_method="gptq", bits=5), "bits is 5, and Penstock reads one of 2, 3, 4, 8"),
        (replaced(quant_method="gptq", bits=4, group_size=0), "group_size is 0"),
        (replaced(quant_method="awq", bits=4, version="gemv"), "version is 'gemv', and Penstock reads gemm"),
        (replaced(quant_method="awq", bits=8), "bits is 8"),
        (in_weights(type="float"), "weights.type is 'float'"),
        (in_weights(num_bits=16), "weights.num_bits is 16"),
        (in_weights(strategy="block"), "weights.strategy is 'block'"),
        (in_weights(group_size=48), "do not fit together"),
        (in_group(weights=None), "quantized weights"),
        (in_group(targets="Linear"), "targets is 'Linear'"),
        (in_group(targets=["re:("]), r"has the pattern '\('"),
        (in_group(targets=["Conv2d"]), "q_proj is quantized .* does not say how"),
        (in_group(format="nvfp4-pack-quantized"), "format is 'nvfp4-pack-quantized'"),
        (in_group(input_activations={"num_bits": 4, "dynamic": True}), "input_activations.num_bits is 4"),
        (in_group(input_activations={"num_bits": 8, "type": "float"}), "input_activations.type is 'float'"),
        (lambda config: config.update(format="float-quantized"), "format is 'float-quantized'"),
        (lambda config: config.update(quantization_status="frozen"), "quantization_status is 'frozen'"),
        (lambda config: config.update(transform_config={"config_groups": {"a": {}}}), "not transformed"),
        (lambda config: config.update(config_groups=[]), r"config_groups is \[\], of the wrong kind"),
    ],
)
def test_what_cannot_be_read_is_refused(change: Callable[[dict[str, Any]], None], message: str, broken: Path) -> None:
    change_config(broken, change)
    with pytest.raises(ModelUnreadable, match=message):
        load_model(broken)


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("weight_scale", lambda _: None, "tensor model.layers.0.self_attn.q_proj.weight"),
        ("weight_packed", lambda _: None, "has no tensor 'weight_packed'|has no tensor 'weight'"),
        ("weight_packed", lambda tensor: tensor[:, :-1].contiguous(), "do not fit together"),
        ("weight_scale", lambda tensor: tensor[:-1].clone(), "do not fit together"),
        ("weight_shape", lambda tensor: tensor * 2, "do not fit together"),
        ("weight_shape", lambda tensor: tensor[:1].clone(), "do not fit together"),
    ],
)
def test_tensors_that_do_not_belong_together(
    part: str, change: Callable[[torch.Tensor], torch.Tensor | None], message: str, broken: Path
) -> None:
    tensors = load_file(broken / "model.safetensors")
    name = f"model.layers.0.self_attn.q_proj.{part}"
    changed = change(tensors.pop(name))
    if changed is not None:
        tensors[name] = changed
    save_file(tensors, broken / "model.safetensors")
    with pytest.raises(ModelUnreadable, match=message):
        load_model(broken)


def test_a_quantized_checkpoint_of_another_family_is_refused(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, "gpt-neox")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(ModelUnreadable, match="GPTNeoXForCausalLM runs in transformers' code"):
        read_config(path)
