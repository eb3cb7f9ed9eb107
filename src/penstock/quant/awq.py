"""The layout of AWQ checkpoints of version ``gemm``, as AutoAWQ writes them.

https://github.com/casper-hansen/AutoAWQ: codes of 4 bits in words along the outputs, in an order that served a GPU's
kernel. N outputs, K inputs, G groups.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from penstock.errors import InvalidSetting
from penstock.kernels.tensor import Tensor
from penstock.quant.codes import QuantizedWeight, Scheme
from penstock.quant.gptq import from_parts, half
from penstock.quant.settings import Settings

_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight outputs each of a word's codes, from the lowest, belongs to"""


def pack(weight: QuantizedWeight) -> dict[str, Tensor]:
    """Return a projection's tensors by the last part of their names.

    ``qweight`` [K, N / 8] int32, ``qzeros`` [G, N / 8] int32, ``scales`` [G, N] float16, which scales are rounded to.
    Raises ``InvalidSetting`` for what the format cannot say.
    """
    scheme, (num_outputs, num_inputs) = weight.scheme, weight.codes.shape
    if scheme.bits != 4 or scheme.activations is not None or scheme.act_order:
        raise InvalidSetting("AWQ has weights of 4 bits in groups of neighbours; write compressed-tensors instead")
    if num_outputs % 8 or (scheme.group is not None and num_inputs % scheme.group):
        raise InvalidSetting(
            f"AWQ has whole groups and outputs by eights, and a projection has {num_inputs} inputs in groups of "
            f"{scheme.group} and {num_outputs} outputs; write compressed-tensors instead"
        )
    zeros = torch.full(weight.scales.shape, scheme.middle, dtype=torch.uint8) if weight.zeros is None else weight.zeros
    return {"qweight": _pack(weight.codes), "qzeros": _pack(zeros), "scales": half(weight.scales).T.contiguous()}


def unpack(tensors: Mapping[str, Tensor], scheme: Scheme) -> QuantizedWeight:
    """Return the weight that ``tensors``, named as ``pack`` names them, hold."""
    codes, zeros = (_unpack(tensors[name]) for name in ("qweight", "qzeros"))
    return from_parts(codes, tensors["scales"].T, zeros, scheme)


def _pack(codes: Tensor) -> Tensor:
    """Return [C, N / 8] int32 from [N, C] uint8."""
    words = torch.zeros(len(codes) // 8, codes.shape[1], dtype=torch.int32)
    for place, output in enumerate(_ORDER):
        words |= codes[output::8].int() << (4 * place)
    return words.T.contiguous()


def _unpack(words: Tensor) -> Tensor:
    """Return [N, C] uint8 from [C, N / 8] int32."""
    data = np.ascontiguousarray(words.numpy().T).view(np.uint8).reshape(words.shape[1], len(words), 4)
    codes = np.empty((words.shape[1], 8, len(words)), np.uint8)
    for place, output in enumerate(_ORDER):
        codes[:, output] = (data[..., place // 2] >> np.uint8(place % 2 * 4)) & np.uint8(15)
    return torch.from_numpy(codes.reshape(-1, len(words)))


@dataclass(frozen=True, slots=True)
class AWQ:
    """See ``layouts.Layout``."""

    scheme: Scheme | None = None

    marker: ClassVar[str] = "qweight"
    parts: ClassVar[tuple[str, ...]] = ("qweight", "qzeros", "scales")

    @classmethod
    def read(cls, settings: Settings) -> "AWQ":
        """Return what a configuration says. Which modules are left out is seen from their tensors."""
        settings.only("version", (None, "gemm"))
        return cls(Scheme(bits=settings.bits("bits", (4,)), group=settings.group("group_size")))

    def scheme_of(self, module: str) -> Scheme | None:
        """Return the one scheme there is."""
        return self.scheme

    pack = staticmethod(pack)
    unpack = staticmethod(unpack)

    @staticmethod
    def describe(schemes: Mapping[str, Scheme], untouched: Sequence[str]) -> dict[str, object]:
        """Return the configuration; raises ``InvalidSetting`` for several schemes."""
        groups = {scheme.group for scheme in schemes.values()}
        if len(groups) != 1:
            raise InvalidSetting(
                f"AWQ has one size of groups for all projections, and here are {len(groups)}; write compressed-tensors"
            )
        (group,) = groups
        return {
            "quant_method": "awq",
            "version": "gemm",
            "bits": 4,
            "group_size": -1 if group is None else group,
            "zero_point": any(not scheme.symmetric for scheme in schemes.values()),
            "modules_to_not_convert": list(untouched),
        }
