"""torch, imported when something computes with it, and without what only tracing, training and old quantization need.

A text model whose kernels are compiled is served without it: half a second of a start, and 100 MB. So ``import torch``
may give a module that is executed when somebody first reaches into it.

The rest is half the time that all of torch takes.

``import torch`` ends by importing all of torch.export, torch.fx, torch.distributions and their like, and by registering
thousands of shape functions and decompositions written in Python. Running ops needs none of them (but torch.Generator
cannot be made without). Here those modules come empty, and are executed, all of them and in torch's order, when
somebody reaches into one of them, or begins to trace.
"""

import ctypes
import importlib.machinery
import importlib.util
import os
import re
import sys
import threading
import types
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.abc import Loader, MetaPathFinder
from pathlib import Path

_REGISTRATIONS = frozenset({"torch._meta_registrations", "torch.distributed._meta_registrations"})
"""Of every version that we run with."""
_LEAVES = frozenset(
    {
        "torch._higher_order_ops",
        "torch._native",
        "torch.ao",
        "torch.compiler",
        "torch.distributions",
        "torch.export",
        "torch.func",
        "torch.fx",
        "torch.fx.experimental",
        "torch.fx.traceback",
        "torch.hub",
        "torch.masked",
        "torch.nested",
        "torch.nn.intrinsic",
        "torch.nn.qat",
        "torch.nn.quantizable",
        "torch.nn.quantized",
        "torch.optim",
        "torch.package",
        "torch.profiler",
        "torch.quantization",
        "torch.utils.data",
        "torchgen.model",
        "unittest",
        "unittest.mock",
    }
)
"""What nothing else reaches into while torch is imported."""
_LEAVES_KNOWN_IN = ("2.13.",)
"""Versions of torch in which that is so. Which modules they are, and in what order they may be executed, is nobody's
promise: another version is to run the tests of this module first, and leaves out the registrations alone until then."""
_ALONE = frozenset(
    {
        "torch.fx._compatibility",
        "torch.fx.experimental.sym_node",
        "torch.fx.operator_schemas",
        "torch.package._mangling",
        "unittest.mock",
    }
)
"""Parts of a package above that are needed, and do not need it."""
_TYPES = frozenset({"numpy._typing", "numpy.typing"})
"""For type checkers, and as long to import as all the rest of numpy, which torch and the engine's modules bring."""
_FUNCTIONS = {"torch._higher_order_ops": ("cond", "while_loop"), "torch.func": ("vmap",)}
"""What torch takes into its own namespace from the modules above."""
_TRACERS = ("torch._dynamo", "torch._inductor")
"""Whose import says that something will be traced."""

_LOCK = threading.RLock()
_afterwards: list[Callable[[], object]] = []
"""What waits for torch to be there"""
_deferred: list[types.ModuleType] = []
"""In the order in which torch asked for them"""


def defer_tracing() -> None:
    """Have a later ``import torch`` leave out what running ops does not need; does nothing where it was imported."""
    if "torch" in sys.modules:
        return
    # Looking through every installed package for torch backends, of which the engine uses none.
    os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
    # Threads for numpy's products of matrices, of which the engine makes none, that spin while they start.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    sys.meta_path.insert(0, _Finder(_TYPES | _REGISTRATIONS | (_LEAVES if _are_leaves_known() else frozenset())))


def defer_torch() -> None:
    """Have a later ``import torch`` import nothing until torch is needed, and then as after ``defer_tracing``."""
    if "torch" not in sys.modules:
        defer_tracing()
        sys.meta_path.insert(0, _TorchFinder())
        # Whoever cannot do without it says what is wrong.
        with suppress(ImportError):
            importlib.import_module("torch")


def is_deferred() -> bool:
    """Return whether nothing has needed torch yet, after ``defer_torch``."""
    return isinstance(sys.modules.get("torch"), _DeferredTorch)


def load_torch() -> None:
    """Import torch, if it is deferred. It is for one thread at a time to need it first."""
    import torch

    with _LOCK:
        if isinstance(torch, _DeferredTorch):
            load_library()
            _execute(torch)
            while _afterwards:
                _afterwards.pop(0)()


def when_imported(call: Callable[[], object]) -> None:
    """Call ``call``, which needs torch: at once, or if torch is deferred, when it is there."""
    with _LOCK:
        if is_deferred():
            _afterwards.append(call)
            return
    call()


def load_library() -> None:
    """Load torch's largest library, a third of its import's time, while other threads may run Python.

    An import would hold the interpreter meanwhile. No other thread can load a library of its own until it is done.
    """
    spec = importlib.util.find_spec("torch") if "torch" not in sys.modules else sys.modules["torch"].__spec__
    library = None if spec is None or spec.origin is None else Path(spec.origin).with_name("lib") / "libtorch_cpu.so"
    if library is not None and library.is_file():
        # Not by CDLL(library), which would hold it as well. What fails here is said by the import.
        load = ctypes.CDLL(None).dlopen
        load.argtypes, load.restype = (ctypes.c_char_p, ctypes.c_int), ctypes.c_void_p
        load(os.fsencode(library), os.RTLD_NOW)


def load_deferred() -> None:
    """Execute what was left out, for code that may trace or makes fake tensors."""
    with _LOCK:
        # What one of them reaches into it gets at once, which may come out of turn.
        modules, _deferred[:] = _deferred[:], []
        for module in modules:
            _load(module)
            for function in _FUNCTIONS.get(module.__name__, ()):
                setattr(sys.modules["torch"], function, getattr(module, function))


def _are_leaves_known() -> bool:
    spec = importlib.util.find_spec("torch")
    file = None if spec is None or spec.origin is None else Path(spec.origin).with_name("version.py")
    # What is installed could be asked for it, in ten times the time.
    said = re.search(r"^__version__ = '(.+)'", file.read_text(), re.MULTILINE) if file and file.is_file() else None
    return said is not None and said[1].startswith(_LEAVES_KNOWN_IN)


def _is_torch_imported() -> bool:
    return not getattr(sys.modules["torch"].__spec__, "_initializing", False)


def _execute(torch: types.ModuleType) -> None:
    spec = torch.__spec__
    assert spec is not None, "our finder made this module"
    assert isinstance(spec.loader, _EmptyLoader), "a module is loaded once"
    spec.loader = torch.__loader__ = spec.loader.loader
    object.__setattr__(torch, "__class__", types.ModuleType)
    spec._initializing = True  # type: ignore[attr-defined]
    try:
        spec.loader.exec_module(torch)
    except BaseException:  # whatever stopped it: the next import would take what there is of it for torch
        del sys.modules["torch"]
        raise
    finally:
        spec._initializing = False  # type: ignore[attr-defined]


class _TorchFinder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname == "torch":
            spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
            if spec is not None and spec.loader is not None:
                spec.loader = _TorchLoader(spec.loader)
            return spec
        if fullname.startswith("torch.") and isinstance(sys.modules["torch"], _DeferredTorch):
            load_torch()
            # Torch may have imported it itself.
            there = sys.modules.get(fullname)
            if there is not None:
                return importlib.machinery.ModuleSpec(fullname, _ThereLoader(there))
        return None


class _ThereLoader(Loader):
    """Gives a module that is there as it is."""

    def __init__(self, module: types.ModuleType) -> None:
        self._module = module
        self._spec = module.__spec__

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return self._module

    def exec_module(self, module: types.ModuleType) -> None:
        module.__spec__ = self._spec


class _Finder(MetaPathFinder):
    def __init__(self, names: frozenset[str]) -> None:
        self._names = names

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname in _TRACERS:
            load_deferred()
        if fullname not in self._names:
            parent = sys.modules.get(fullname.rpartition(".")[0])
            if isinstance(parent, _Deferred) and fullname not in _ALONE:
                _reach(parent)
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _EmptyLoader(spec.loader)
        return spec


class _EmptyLoader(Loader):
    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        module = _Deferred(spec.name)
        if spec.name not in _TYPES:
            _deferred.append(module)
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        pass


class _TorchLoader(_EmptyLoader):
    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _DeferredTorch(spec.name)


class _DeferredTorch(types.ModuleType):
    """torch, until something of it is asked for."""

    def __getattr__(self, name: str) -> object:
        if name.startswith("__") and name != "__version__":
            raise AttributeError(f"module 'torch' has no attribute {name!r}")
        load_torch()
        return getattr(self, name)


class _Deferred(types.ModuleType):
    """A module that is executed when a name is missing.

    Unlike ``importlib.util.LazyLoader``'s it stays empty when its special attributes are read: inspect reads those of
    every module there is.
    """

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        if self.__name__ in _TYPES and name == "NDArray":
            return list  # numpy's own modules, and ours, annotate with it
        if name in _FUNCTIONS.get(self.__name__, ()) and not _is_torch_imported():
            return lambda *args, **kwargs: getattr(self, name)(*args, **kwargs)
        _reach(self)
        return getattr(self, name)


def _reach(module: types.ModuleType) -> None:
    """Execute what was left empty, and with one of torch's modules, once torch is there, all others."""
    if module.__name__.startswith("torch") and _is_torch_imported():
        load_deferred()
    _load(module)


def _load(module: types.ModuleType) -> None:
    """Execute what was left empty, unless that was begun."""
    with _LOCK:
        if not isinstance(module, _Deferred):
            return
        spec = module.__spec__
        assert spec is not None, "our finder made this module"
        assert isinstance(spec.loader, _EmptyLoader), "a module is loaded once"
        spec.loader = module.__loader__ = spec.loader.loader
        object.__setattr__(module, "__class__", types.ModuleType)
        spec.loader.exec_module(module)
