"""The layout of compressed-tensors, which llm-compressor writes and vLLM reads.

https://github.com/vllm-project/compressed-tensors: *pack-quantized* keeps codes of 2 to 8 bits in words along the
inputs; *int-quantized* keeps them as signed bytes, and is used where activations are rounded too. N outputs, K inputs,
G groups, b bits.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from penstock.errors import InvalidSetting
from penstock.kernels import InputCodes
from penstock.kernels.tensor import Tensor
from penstock.quant.codes import QuantizedWeight, Scheme
from penstock.quant.settings import Settings, matches
from penstock.quant.words import pack_words, unpack_words

_FORMATS = ("pack-quantized", "int-quantized", "naive-quantized")
_BITS = range(2, 9)

KV_CACHE_SCHEME = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}
"""Of keys and values with a ``k_scale`` and a ``v_scale`` [1] float32 beside each layer's attention"""


def pack(weight: QuantizedWeight) -> dict[str, Tensor]:
    """Return a projection's tensors by the last part of their names.

    Rounded activations:  ``weight`` [N, K] int8, ``weight_scale`` and ``weight_zero_point`` [N, G] int8, and for static
    ones ``input_scale`` [1] float32 and ``input_zero_point`` [1] int8.
    Weights alone: ``weight_packed`` [N, ceil(K b / 32)] int32, ``weight_scale``, ``weight_shape`` [2] int64,
    ``weight_zero_point`` [ceil(N b / 32), G] int32, and ``weight_g_idx`` [K] int32.
    """
    scheme, zeros = weight.scheme, weight.zeros
    tensors = {"weight_scale": weight.scales.contiguous()}
    if scheme.activations is None:
        tensors["weight_packed"] = pack_words(weight.codes, scheme.bits)
        tensors["weight_shape"] = torch.tensor(weight.codes.shape)
        if zeros is not None:
            tensors["weight_zero_point"] = pack_words(zeros.T.contiguous(), scheme.bits).T.contiguous()
        if weight.groups is not None:
            tensors["weight_g_idx"] = weight.groups.int()
        return tensors
    if weight.groups is not None:
        raise InvalidSetting("compressed-tensors has no activations of 8 bits beside groups in order of activations")
    tensors["weight"] = _signed(weight.codes, scheme)
    if zeros is not None:
        tensors["weight_zero_point"] = _signed(zeros, scheme)
    if weight.inputs is not None:
        tensors["input_scale"] = torch.tensor([weight.inputs.scale])
        if scheme.activation_zeros:
            tensors["input_zero_point"] = torch.tensor([weight.inputs.zero], dtype=torch.int8)
    return tensors


def unpack(tensors: Mapping[str, Tensor], scheme: Scheme) -> QuantizedWeight:
    """Return the weight that ``tensors``, named as ``pack`` names them, hold."""
    scales, zeros, groups = tensors["weight_scale"], tensors.get("weight_zero_point"), tensors.get("weight_g_idx")
    if "weight_packed" in tensors:
        num_outputs, num_inputs = tensors["weight_shape"].tolist()
        codes = unpack_words(tensors["weight_packed"], scheme.bits, num_inputs)
        zeros = None if zeros is None else unpack_words(zeros.T, scheme.bits, num_outputs).T.contiguous()
    else:
        codes = _unsigned(tensors["weight"], scheme)
        num_outputs, num_inputs = codes.shape
        zeros = None if zeros is None else _unsigned(zeros, scheme).view(scales.shape)
    # Where there is one for the whole tensor, it is each output's.
    shape = (num_outputs, scheme.num_groups(num_inputs))
    return QuantizedWeight(
        scheme=scheme,
        codes=codes,
        scales=scales.expand(shape),
        zeros=None if scheme.symmetric or zeros is None else zeros.expand(shape),
        groups=groups if scheme.act_order else None,
        inputs=_unpack_inputs(tensors, scheme),
    )


def _unpack_inputs(tensors: Mapping[str, Tensor], scheme: Scheme) -> InputCodes | None:
    if scheme.activations != "static":
        return None
    # Symmetric activations may come with a zero all the same, which is 0.
    zero = tensors["input_zero_point"] if scheme.activation_zeros else tensors.get("input_zero_point")
    scale = tensors["input_scale"].item()
    if not 0 < scale < math.inf:
        raise ValueError(f"input_scale is {scale}")
    return InputCodes(scale, 0 if zero is None else int(zero.item()))


def _signed(codes: Tensor, scheme: Scheme) -> Tensor:
    return (codes.short() - scheme.middle).to(torch.int8)


def _unsigned(codes: Tensor, scheme: Scheme) -> Tensor:
    return (codes.short() + scheme.middle).to(torch.uint8)


@dataclass(frozen=True, slots=True)
class CompressedTensors:
    """See ``layouts.Layout``."""

    groups: tuple[tuple[tuple[str, ...], Scheme], ...] = ()
    """What each scheme is for: names, patterns after ``re:``, or kinds of modules, of which ``Linear`` is all"""

    marker: ClassVar[str] = "weight_scale"
    parts: ClassVar[tuple[str, ...]] = (
        "weight_packed",
        "weight",
        "weight_scale",
        "weight_zero_point",
        "weight_shape",
        "weight_g_idx",
        "input_scale",
        "input_zero_point",
    )

    @classmethod
    def read(cls, settings: Settings) -> "CompressedTensors":
        """Return what a configuration says.

        Its ``ignore`` is not asked: whether a module is quantized is seen from its tensors. Nor is its
        ``kv_cache_scheme``: what keys and values are kept in is chosen where the model is served.
        """
        settings.only("quantization_status", (None, "compressed"))
        settings.only("format", (None, *_FORMATS, "mixed-precision", "dense"))
        for key in ("sparsity_config", "transform_config"):
            part = settings.part(key)
            if part is not None and part.values and part.values.get("format") != "dense":
                raise settings.bad(key, dict(part.values), "weights that are whole and not transformed")
        groups = settings.part("config_groups")
        if groups is None:
            raise settings.bad("config_groups", None, "a scheme for each group of modules")
        return cls(tuple(_read_group(groups.part(name)) for name in groups.values))

    def scheme_of(self, module: str) -> Scheme | None:
        """Return the scheme of the group that names ``module``, or a pattern it matches, or all."""
        kinds = (
            lambda target: target == module,
            lambda target: target.startswith("re:") and matches(target[3:], module),
            lambda target: target == ("Embedding" if _is_table(module) else "Linear"),
            lambda target: target == "Linear",
        )
        for is_meant in kinds:
            for targets, scheme in self.groups:
                if any(map(is_meant, targets)):
                    return scheme
        return None

    pack = staticmethod(pack)
    unpack = staticmethod(unpack)

    @staticmethod
    def describe(schemes: Mapping[str, Scheme], untouched: Sequence[str]) -> dict[str, object]:
        """Return the configuration; modules are named where there are several schemes."""
        kinds = list(dict.fromkeys(schemes.values()))
        groups: dict[str, Any] = {}
        for number, kind in enumerate(kinds):
            named = [name for name, scheme in schemes.items() if scheme == kind]
            # All linear modules that are not left out; a table of embeddings is none.
            targets = ["Linear", *filter(_is_table, named)] if len(kinds) == 1 else named
            groups[f"group_{number}"] = {"targets": targets, **_describe_scheme(kind)}
        formats = {group["format"] for group in groups.values()}
        return {
            "quant_method": "compressed-tensors",
            "format": formats.pop() if len(formats) == 1 else "mixed-precision" if formats else "dense",
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": list(untouched),
            "kv_cache_scheme": None,
        }


def _is_table(module: str) -> bool:
    return module.endswith("embed_tokens")


def _read_group(group: Settings | None) -> tuple[tuple[str, ...], Scheme]:
    assert group is not None
    group.only("format", (None, *_FORMATS))
    targets, weights = group.values.get("targets"), group.part("weights")
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise group.bad("targets", targets, "a list of names")
    if weights is None or group.values.get("output_activations") is not None:
        raise group.bad("weights", None, "quantized weights, and outputs that are not")
    weights.only("type", (None, "int"))
    strategy = weights.only("strategy", (None, "tensor", "channel", "group"))
    has_groups = strategy == "group" or (strategy is None and weights.group("group_size") is not None)
    actorder = weights.only("actorder", (None, False, "weight", "static", "group", "dynamic"))
    activations = group.part("input_activations")
    return tuple(targets), Scheme(
        bits=weights.bits("num_bits", _BITS),
        group=weights.group("group_size") if has_groups else None,
        symmetric=weights.values.get("symmetric") is not False,
        act_order=actorder in ("group", "dynamic"),
        activations=_read_activations(activations),
        activation_zeros=activations is not None
        and activations.values.get("dynamic") is not True
        and activations.values.get("symmetric") is False,
    )


def _read_activations(activations: Settings | None) -> str | None:
    if activations is None:
        return None
    activations.only("type", (None, "int"))
    activations.bits("num_bits", (8,))
    if activations.only("dynamic", (None, False, True)):
        return "dynamic"
    activations.only("strategy", (None, "tensor"))
    return "static"


def _describe_scheme(scheme: Scheme) -> dict[str, object]:
    weights = {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": scheme.symmetric,
        "strategy": "channel" if scheme.group is None else "group",
        "group_size": scheme.group,
        "dynamic": False,
        "actorder": "group" if scheme.act_order else None,
    }
    is_dynamic = scheme.activations == "dynamic"
    activations = {
        "num_bits": 8,
        "type": "int",
        "symmetric": not scheme.activation_zeros,
        "strategy": "token" if is_dynamic else "tensor",
        "dynamic": is_dynamic,
    }
    return {
        "weights": weights,
        "input_activations": None if scheme.activations is None else activations,
        "output_activations": None,
        "format": "pack-quantized" if scheme.activations is None else "int-quantized",
    }
