"""torch, imported without what only tracing needs: a third of the time that importing all of it takes.

``import torch`` ends by registering thousands of shape functions and decompositions written in Python. torch.compile,
torch.export and fake tensors use them, and torch.Generator cannot be made without them; running ops does not. Here
those modules come empty, and are executed when somebody reaches into one of them, or begins to trace.
"""

import importlib.machinery
import importlib.util
import os
import sys
import threading
import types
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder

_DEFERRED = ("torch._meta_registrations", "torch.distributed._meta_registrations")
_TRACERS = ("torch._dynamo", "torch._inductor")
"""Whose import says that something will be traced."""

_LOCK = threading.RLock()


def defer_tracing() -> None:
    """Have a later ``import torch`` leave out what only tracing needs; does nothing where torch is imported already."""
    if "torch" not in sys.modules:
        # Looking through every installed package for torch backends, of which the engine uses none.
        os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
        sys.meta_path.insert(0, _Finder())


def load_deferred() -> None:
    """Execute what was left out, for code that may trace or makes fake tensors."""
    for name in _DEFERRED:
        module = sys.modules.get(name)
        if isinstance(module, _Deferred):
            module.load()


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname in _TRACERS:
            load_deferred()
        if fullname not in _DEFERRED:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _EmptyLoader(spec.loader)
        return spec


class _EmptyLoader(Loader):
    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _Deferred(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


class _Deferred(types.ModuleType):
    """A module that is executed when a name is missing.

    Unlike ``importlib.util.LazyLoader``'s it stays empty when its special attributes are read: inspect reads those of
    every module there is.
    """

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        self.load()
        return getattr(self, name)

    def load(self) -> None:
        with _LOCK:
            if type(self) is not _Deferred:
                return
            spec = self.__spec__
            assert spec is not None, "our finder made this module"
            assert isinstance(spec.loader, _EmptyLoader), "a module is loaded once"
            spec.loader = self.__loader__ = spec.loader.loader
            object.__setattr__(self, "__class__", types.ModuleType)
            spec.loader.exec_module(self)
