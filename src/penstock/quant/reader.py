"""The quantized modules of a checkpoint, one at a time."""

from collections.abc import Iterator
from typing import Protocol

from penstock.errors import ModelUnreadable
from penstock.kernels.tensor import Tensor
from penstock.quant.codes import QuantizedWeight, Scheme
from penstock.quant.layouts import Layout


class StoredTensors(Protocol):
    """The tensors of a checkpoint as they are stored, by name."""

    def __contains__(self, name: str) -> bool:
        """Return whether there is one called ``name``."""

    def __iter__(self) -> Iterator[str]:
        """Yield all names."""

    def read(self, name: str) -> Tensor:
        """Return a tensor that is there."""


class QuantizedModules:
    """Modules that have codes, by name. Whether one has is seen from its tensors."""

    def __init__(self, layout: Layout, stored: StoredTensors) -> None:
        self._layout = layout
        self._stored = stored

    def __contains__(self, module: str) -> bool:
        return f"{module}.{self._layout.marker}" in self._stored

    def __iter__(self) -> Iterator[str]:
        """Yield the names of all."""
        ending = f".{self._layout.marker}"
        return (name.removesuffix(ending) for name in self._stored if name.endswith(ending))

    def scheme(self, module: str) -> Scheme:
        """Return how a module is quantized. Raises ``ModelUnreadable`` if the configuration does not say."""
        scheme = self._layout.scheme_of(module)
        if scheme is None:
            raise ModelUnreadable(
                f"{module} is quantized ({module}.{self._layout.marker}), and quantization_config does not say how; "
                "fetch config.json again"
            )
        return scheme

    def parts(self, module: str) -> list[str]:
        """Return the names of a module's tensors, its bias left out."""
        names = (f"{module}.{part}" for part in self._layout.parts)
        return [name for name in names if name in self._stored]

    def weight(self, module: str) -> QuantizedWeight:
        """Return a module's weight. Raises ``ModelUnreadable`` if its tensors do not fit together."""
        scheme = self.scheme(module)
        tensors = {name.removeprefix(f"{module}."): self._stored.read(name) for name in self.parts(module)}
        try:
            return self._layout.unpack(tensors, scheme)
        except KeyError as error:
            raise ModelUnreadable(
                f"{module} has no tensor {error}: the checkpoint is incomplete; fetch it again"
            ) from error
        except (ValueError, RuntimeError, IndexError, TypeError) as error:
            raise ModelUnreadable(
                f"{module}'s tensors do not fit together ({error}), nor with what quantization_config says of it "
                f"({scheme}); fetch the checkpoint again"
            ) from error
