"""Which layout a checkpoint has, and what all of them offer."""

from collections.abc import Mapping, Sequence
from typing import ClassVar, Protocol

from penstock.errors import InvalidSetting, ModelUnreadable
from penstock.kernels.tensor import Tensor
from penstock.quant.awq import AWQ
from penstock.quant.codes import QuantizedWeight, Scheme
from penstock.quant.compressed_tensors import CompressedTensors
from penstock.quant.gptq import GPTQ
from penstock.quant.settings import REMEDY, Settings


class Layout(Protocol):
    """How a checkpoint keeps codes. Modules are projections by name, such as ``model.layers.0.mlp.up_proj``."""

    marker: ClassVar[str]
    """The last part of a name that every quantized module has, and no other"""
    parts: ClassVar[tuple[str, ...]]
    """The last parts of all names that modules may have"""

    def scheme_of(self, module: str) -> Scheme | None:
        """Return how a module is quantized if it has codes, None if the configuration does not say."""

    def unpack(self, tensors: Mapping[str, Tensor], scheme: Scheme) -> QuantizedWeight:
        """Return the weight whose tensors these are, by the last part of their names.

        Raises KeyError, ValueError or RuntimeError where they do not fit together.
        """

    def pack(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        """Return a weight's tensors by the last part of their names. Raises ``InvalidSetting``."""

    def describe(self, schemes: Mapping[str, Scheme], untouched: Sequence[str]) -> dict[str, object]:
        """Return the quantization_config of modules with these schemes beside others that are ``untouched``.

        Raises ``InvalidSetting`` for what the layout cannot say.
        """


def read_layout(config: object, where: str = "config.json") -> Layout:
    """Return the layout that ``config``, the ``quantization_config`` of the file ``where``, describes.

    Raises ``ModelUnreadable`` for one that Penstock does not read, with the remedy.
    """
    settings = Settings(config, f"{where}: quantization_config")
    method = settings.values.get("quant_method")
    match method:
        case "compressed-tensors" | "compressed_tensors":
            return CompressedTensors.read(settings)
        case "gptq":
            return GPTQ.read(settings)
        case "awq":
            return AWQ.read(settings)
    raise ModelUnreadable(
        f"{where}: the weights are quantized ({method or 'quant_method is not given'}), and Penstock reads "
        f"compressed-tensors of integers, gptq and awq; {REMEDY}"
    )


LAYOUTS = ("compressed-tensors", "gptq", "gptq_v2", "awq")
"""What checkpoints can be written in"""


def layout_to_write(name: str) -> Layout:
    """Return the layout called ``name``, for writing. Raises ``InvalidSetting``."""
    match name:
        case "compressed-tensors":
            return CompressedTensors()
        case "gptq":
            return GPTQ(version=1)
        case "gptq_v2":
            return GPTQ(version=2)
        case "awq":
            return AWQ()
    raise InvalidSetting(f"there is no layout {name!r} of quantized checkpoints; there are {', '.join(LAYOUTS)}")
