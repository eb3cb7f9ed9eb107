"""The layout of GPTQ checkpoints, as AutoGPTQ and GPTQModel write them.

https://github.com/ModelCloud/GPTQModel: codes of 2, 3, 4 or 8 bits in words along the inputs, zeros in words along the
outputs. In version 1 of the format zeros are stored less one. N outputs, K inputs, G groups, b bits.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from penstock.errors import InvalidSetting
from penstock.kernels.tensor import Tensor
from penstock.quant.codes import QuantizedWeight, Scheme
from penstock.quant.settings import Settings, matches
from penstock.quant.words import pack_words, unpack_words

_BITS = (2, 3, 4, 8)
_VERSIONS = {None: 1, "gptq": 1, "gptq_v2": 2}


@dataclass(frozen=True, slots=True)
class GPTQ:
    """See ``layouts.Layout``."""

    version: int = 1
    base: Scheme | None = None
    rules: tuple[tuple[str, Scheme], ...] = field(default=())
    """By pattern, what differs from ``base``"""

    marker: ClassVar[str] = "qweight"
    parts: ClassVar[tuple[str, ...]] = ("qweight", "qzeros", "scales", "g_idx")

    @classmethod
    def read(cls, settings: Settings) -> "GPTQ":
        """Return what a configuration says. Which modules are left out is seen from their tensors."""
        version = _VERSIONS[settings.only("checkpoint_format", tuple(_VERSIONS))]  # type: ignore[index]
        settings.only("is_marlin_format", (None, False))
        settings.only("pack_dtype", (None, "int32"))
        dynamic = settings.part("dynamic")
        rules = []
        for pattern, changes in ({} if dynamic is None else dynamic.values).items():
            if not pattern.startswith("-:"):
                changed = Settings({**settings.values, **changes}, f"{settings.where}.dynamic.{pattern}")
                rules.append((pattern.removeprefix("+:"), _read_scheme(changed)))
        return cls(version, _read_scheme(settings), tuple(rules))

    def scheme_of(self, module: str) -> Scheme | None:
        """Return what the first rule for ``module`` says, or the base."""
        return next((scheme for pattern, scheme in self.rules if matches(pattern, module)), self.base)

    @property
    def _format(self) -> str:
        return "gptq" if self.version == 1 else "gptq_v2"

    def unpack(self, tensors: Mapping[str, Tensor], scheme: Scheme) -> QuantizedWeight:
        """See ``unpack``."""
        return unpack(tensors, scheme, version=self.version)

    def pack(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        """See ``pack``."""
        return pack(weight, version=self.version)

    def describe(self, schemes: Mapping[str, Scheme], untouched: Sequence[str]) -> dict[str, object]:
        """Return the configuration: the commonest scheme, and rules for modules of others and for those left out."""
        ((base, _),) = Counter(schemes.values()).most_common(1)
        dynamic: dict[str, Any] = {f"-:^{re.escape(name)}$": {} for name in untouched}
        dynamic |= {
            f"+:^{re.escape(name)}$": _describe_scheme(scheme) for name, scheme in schemes.items() if scheme != base
        }
        return {
            "quant_method": "gptq",
            "checkpoint_format": self._format,
            "pack_dtype": "int32",
            "lm_head": "lm_head" in schemes,
            "dynamic": dynamic,
            **_describe_scheme(base),
        }


def _read_scheme(settings: Settings) -> Scheme:
    """Return bits and group; the rest is seen from tensors."""
    return Scheme(bits=settings.bits("bits", _BITS), group=settings.group("group_size"))


def _describe_scheme(scheme: Scheme) -> dict[str, object]:
    return {
        "bits": scheme.bits,
        "group_size": -1 if scheme.group is None else scheme.group,
        "sym": scheme.symmetric,
        "desc_act": scheme.act_order,
    }


def pack(weight: QuantizedWeight, *, version: int = 1) -> dict[str, Tensor]:
    """Return a projection's tensors by the last part of their names, in the format's ``version``, 1 or 2.

    ``qweight`` [ceil(K b / 32), N] int32, ``qzeros`` [G, ceil(N b / 32)] int32, ``scales`` [G, N] float16, ``g_idx``
    [K] int32. Scales that float16 does not hold are rounded to it: round them before codes are chosen.
    Raises ``InvalidSetting`` for what the format cannot say.
    """
    scheme = weight.scheme
    if scheme.bits not in _BITS or scheme.activations is not None:
        raise InvalidSetting(
            f"GPTQ has weights of {', '.join(map(str, _BITS))} bits and activations as they are; write "
            "compressed-tensors instead"
        )
    zeros = torch.full(weight.scales.shape, scheme.middle, dtype=torch.uint8) if weight.zeros is None else weight.zeros
    if version == 1:
        if not zeros.all():
            raise InvalidSetting("GPTQ's version 1 has no zero of 0, and readers disagree on it; write version 2")
        zeros = zeros - 1
    return {
        "qweight": pack_words(weight.codes, scheme.bits).T.contiguous(),
        "qzeros": pack_words(zeros.T.contiguous(), scheme.bits),
        "scales": half(weight.scales).T.contiguous(),
        "g_idx": weight.group_of_inputs().int(),
    }


def unpack(tensors: Mapping[str, Tensor], scheme: Scheme, *, version: int = 1) -> QuantizedWeight:
    """Return the weight that ``tensors``, named as ``pack`` names them, hold.

    What the tensors say counts, not ``scheme``, as to symmetry and the order of groups.
    """
    words, scales, groups = tensors["qweight"], tensors["scales"].T, tensors.get("g_idx")
    num_inputs = len(words) * 32 // scheme.bits if groups is None else len(groups)
    codes = unpack_words(words.T, scheme.bits, num_inputs)
    zeros = unpack_words(_true_zeros(tensors["qzeros"], scheme.bits, version), scheme.bits, len(codes)).T
    if groups is not None and torch.equal(groups.long(), torch.arange(num_inputs) // (scheme.group or num_inputs)):
        groups = None
    return from_parts(codes, scales, zeros, scheme, groups)


def from_parts(
    codes: Tensor, scales: Tensor, zeros: Tensor, scheme: Scheme, groups: Tensor | None = None
) -> QuantizedWeight:
    """Return the weight; symmetric if all ``zeros`` are in the middle, in order if ``groups`` are None."""
    symmetric = bool((zeros == scheme.middle).all())
    found = Scheme(bits=scheme.bits, group=scheme.group, symmetric=symmetric, act_order=groups is not None)
    return QuantizedWeight(
        scheme=found,
        codes=codes,
        scales=scales.contiguous(),
        zeros=None if symmetric else zeros.contiguous(),
        groups=groups,
    )


def half(scales: Tensor) -> Tensor:
    """Return ``scales`` in float16; raises ``InvalidSetting`` where it does not reach so far."""
    rounded = scales.half()
    if not rounded.isfinite().all():
        raise InvalidSetting("a scale is beyond float16, which GPTQ and AWQ keep them in; write compressed-tensors")
    return rounded


def _true_zeros(words: Tensor, bits: int, version: int) -> Tensor:
    """Return zeros in words as version 2 has them.

    Zeros of 0 are rare in version 1, and then GPTQModel, its one writer, borrowed from the next code of the word: words
    are added as a whole. Three bits straddle words, and it wrapped each by itself.
    """
    if version == 2:
        return words
    num_codes = words.shape[1] * 32 // bits
    if bits == 3:
        return pack_words((unpack_words(words, bits, num_codes) + 1) & 7, bits)
    return words + pack_words(torch.ones(1, num_codes, dtype=torch.uint8), bits)  # int32 wraps around
