"""The checkpoint that is compressed: each tensor read when it is needed."""

from pathlib import Path

from torch import Tensor

from penstock.errors import ModelUnreadable
from penstock.gguf import is_gguf
from penstock.models import ModelConfig, read_config
from penstock.models.files import plain_name, weight_files
from penstock.models.weights import Weights
from penstock.quant import QuantizedWeight


class Checkpoint:
    """A directory in Hugging Face layout with a native decoder that is not quantized yet; also a ``TensorSource``."""

    def __init__(self, path: Path) -> None:
        """Read the configuration and the names of all tensors. Raises ``ModelUnreadable``."""
        if is_gguf(path):
            raise ModelUnreadable(f"{path} is a GGUF file; compress the safetensors checkpoint that it was made from")
        self.path = path
        self.config: ModelConfig = read_config(path)
        if not self.config.is_native:
            raise ModelUnreadable(
                f"{path}: {self.config.architecture} runs in transformers' code; only native families can be compressed"
            )
        if self.config.low_rank:
            raise ModelUnreadable(
                f"{path} has matrices of low rank already; compress the checkpoint that it was made from"
            )
        with Weights(path) as self._weights:
            self._stored = {plain_name(name): name for name in self._weights}
        self.names: list[str] = sorted(self._stored)
        """Of all tensors, as models ask for them"""
        if self._weights.quantized is not None:
            raise ModelUnreadable(
                f"{path} is quantized already; compress the bf16, fp16 or fp32 checkpoint that it was made from"
            )
        self.num_bytes = sum(file.stat().st_size for file in weight_files(path))
        """Of all files with weights"""

    def read(self, name: str) -> Tensor:
        """Return the tensor ``name`` as it is stored. Raises ``ModelUnreadable``."""
        if name not in self._stored:
            raise ModelUnreadable(f"{self.path} has no tensor {name}: the checkpoint is incomplete")
        return self._weights.read(self._stored[name])

    def stored_name(self, name: str) -> str:
        """Return what the files call the tensor ``name``, or would if a layer had it."""
        if name in self._stored:
            return self._stored[name]
        plain, stored = next(item for item in self._stored.items() if layer_of(item[0]) is not None)
        return stored.removesuffix(plain.removeprefix("model.")) + name.removeprefix("model.")

    def take(self, name: str, shape: tuple[int, ...], dtype: str) -> Tensor:
        """See ``TensorSource``."""
        return self._weights.take(name, shape, dtype)

    def take_codes(self, module: str, shape: tuple[int, int]) -> QuantizedWeight | None:
        """Return None: nothing is in codes."""
        return None


def layer_of(name: str) -> int | None:
    """Return the layer that a tensor belongs to, None for those of no layer."""
    parts = name.removeprefix("model.layers.").split(".", 1)
    return int(parts[0]) if name.startswith("model.layers.") and parts[0].isdecimal() else None
