"""What no layer holds, embeddings and head, vision encoder and projector: rounded before the first layer is run.

N outputs or vocabulary, K inputs.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from penstock.compress.checkpoint import Checkpoint
from penstock.compress.layer import CompressedLayer, UnitReport
from penstock.compress.methods.rtn import rtn
from penstock.compress.output import read_codes
from penstock.compress.recipe import Treatment
from penstock.compress.units import Unit
from penstock.kernels.dtypes import torch_dtype
from penstock.quant import QuantizedWeight, Scheme, dequantize

_ROWS = 8192
"""Rounded at a time: in float32 the whole matrix may be larger than a layer"""


def compress_ends(checkpoint: Checkpoint, treatments: Mapping[Unit, Treatment]) -> CompressedLayer:
    """Return the codes of those matrices that are to have some."""
    ends = CompressedLayer()
    for unit, treatment in treatments.items():
        if not treatment.makes_codes:
            continue
        for module in unit.modules:
            weight_NK = checkpoint.read(f"{module}.weight")
            parts = [rtn(part.float(), treatment.scheme) for part in torch.split(weight_NK, _ROWS)]
            zeros = [part.zeros for part in parts if part.zeros is not None]
            ends.codes[module] = replace(
                parts[0],
                codes=torch.cat([part.codes for part in parts]),
                scales=torch.cat([part.scales for part in parts]),
                zeros=torch.cat(zeros) if zeros else None,
            )
        ends.reports.append(UnitReport(unit.label, treatment.method, treatment.bits, None))
    return ends


class WithEnds:
    """A ``TensorSource``: the checkpoint, but for those of its ends that are in codes by now; none of them is held."""

    def __init__(self, checkpoint: Checkpoint, file: Path, schemes: Mapping[str, Scheme]) -> None:
        """``file`` will hold ends with these ``schemes``, by module; others' are not asked for."""
        self._checkpoint = checkpoint
        self._file = file
        self._schemes = schemes

    def take(self, name: str, shape: tuple[int, ...], dtype: str) -> Tensor:
        """See ``TensorSource``."""
        module = name.removesuffix(".weight")
        if module not in self._schemes:
            return self._checkpoint.take(name, shape, dtype)
        with safe_open(self._file, framework="pt") as done:
            return dequantize(read_codes(done, module, self._schemes[module])).to(torch_dtype(dtype))

    def take_codes(self, module: str, shape: tuple[int, int]) -> QuantizedWeight | None:
        """See ``TensorSource``."""
        return self._checkpoint.take_codes(module, shape)
