"""Each in a process of its own: here torch is imported already."""

import subprocess
import sys

_LEAN = "from penstock.lean_torch import defer_tracing, load_deferred; defer_tracing(); import sys, torch\n"
_IS_WHOLE = "from torch._subclasses.fake_tensor import FakeTensorMode\n" + (
    "with FakeTensorMode():\n"
    "    assert torch.nn.functional.avg_pool2d(torch.randn(1, 1, 4, 4), 2).shape == (1, 1, 2, 2)\n"
    "    x = torch.randn(3, 4)\n"
    "    assert torch.ops.aten._embedding_bag(x, torch.tensor([1]), torch.tensor([0]))[0].shape == (1, 4)\n"
)


def _run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_what_only_tracing_needs_is_left_out() -> None:
    loaded = _run(
        _LEAN + "import inspect\n"
        # What reads the special attributes of every module does not bring it.
        "inspect.getmodule(inspect.currentframe())\n"
        "print('torch._decomp' in sys.modules, 'torch._refs' in sys.modules)"
    )
    assert loaded.split() == ["False", "False"]


def test_torch_itself_would_load_it() -> None:
    # Else the two modules could be left to torch.
    assert _run("import sys, torch; print('torch._decomp' in sys.modules)").strip() == "True"


def test_it_comes_when_asked_for() -> None:
    _run(_LEAN + "load_deferred(); assert 'torch._decomp' in sys.modules; torch.Generator()\n" + _IS_WHOLE)


def test_it_comes_when_somebody_reaches_into_it() -> None:
    _run(_LEAN + "from torch._meta_registrations import meta_index_Tensor; assert 'torch._decomp' in sys.modules\n")


def test_it_comes_with_the_compiler() -> None:
    _run(_LEAN + "import torch._dynamo; assert 'torch._decomp' in sys.modules\n" + _IS_WHOLE)


def test_reaching_into_one_brings_all_that_torch_itself_has() -> None:
    names = "print(*sorted(name for name in sys.modules if name.startswith('torch')))"
    whole = _run(f"import sys, torch; {names}").split()
    lean = _run(
        _LEAN
        + "for name in ('torch._export', 'torch.fx.graph', 'torch.nested._internal'): assert name not in sys.modules\n"
        "assert torch.distributions.Normal(0.0, 1.0).sample().shape == ()\n"
        f"assert torch.cond is torch._higher_order_ops.cond and torch.vmap is torch.func.vmap; {names}"
    ).split()
    assert lean == whole


def test_functions_of_what_is_left_out_bring_it() -> None:
    _run(
        _LEAN + "assert torch.vmap(lambda x: 2 * x)(torch.ones(3)).tolist() == [2.0] * 3; "
        "assert 'torch._export' in sys.modules\n"
        "import torch.fx.passes; assert torch.fx.symbolic_trace(torch.nn.Linear(2, 2)).graph.nodes\n"
    )


def test_of_another_version_only_registrations_are_left_out() -> None:
    _run(
        "from penstock import lean_torch; lean_torch._LEAVES_KNOWN_IN = ('2.12.',)\n"
        + _LEAN
        + "assert 'torch._export' in sys.modules and 'torch._decomp' not in sys.modules\n"
    )


def test_types_come_when_more_of_them_is_asked_for_than_annotations_need() -> None:
    _run(
        _LEAN + "import numpy, numpy.typing; assert 'numpy._typing._char_codes' not in sys.modules\n"
        "numpy.typing.NDArray[numpy.int64] | None\n"
        "from numpy.typing import ArrayLike\n"
        "assert 'numpy._typing._char_codes' in sys.modules and numpy.typing.NDArray is not list\n"
        "assert 'torch._decomp' not in sys.modules\n"
    )


def test_a_test_runner_finds_what_it_needs() -> None:
    _run(
        _LEAN + "assert 'unittest.case' not in sys.modules\n"
        "from unittest import TestCase, mock; mock.patch.object\n"
        "assert 'torch._decomp' not in sys.modules\n"
    )


def test_too_late_does_nothing() -> None:
    _run(
        "import sys, types; sys.modules['torch'] = types.ModuleType('torch'); before = list(sys.meta_path)\n"
        "from penstock.lean_torch import defer_tracing; defer_tracing(); assert sys.meta_path == before\n"
    )


def test_others_run_while_its_library_is_loaded() -> None:
    _run(
        "import sys, threading, time\n"
        "from pathlib import Path\n"
        "from penstock.lean_torch import load_library\n"
        "ran_at = []\n"
        "def run():\n"
        "    while not is_loaded.is_set():\n"
        "        ran_at.append(time.perf_counter())\n"
        "is_loaded, other = threading.Event(), threading.Thread(target=run)\n"
        "other.start(); began = time.perf_counter()\n"
        "load_library()\n"
        "took = time.perf_counter() - began; is_loaded.set(); other.join()\n"
        "assert any(began + took / 4 < at < began + 3 * took / 4 for at in ran_at)\n"
        "assert 'libtorch_cpu' in Path('/proc/self/maps').read_text() and 'torch' not in sys.modules\n"
        "import torch; assert torch.ones(2).sum() == 2; load_library()\n"
    )


_LATE = (
    "from penstock.lean_torch import defer_torch, is_deferred, load_torch, when_imported; defer_torch(); import sys\n"
)


def test_torch_is_not_there_before_it_is_needed() -> None:
    _run(
        _LATE + "import torch, inspect\n"
        "inspect.getmodule(inspect.currentframe())\n"
        "assert is_deferred() and 'torch._C' not in sys.modules\n"
        "assert torch.arange(3).sum() == 3\n"
        "assert not is_deferred() and 'torch._decomp' not in sys.modules and sys.modules['torch'] is torch\n"
        "load_torch()\n"
    )


def test_a_part_of_it_brings_it_once() -> None:
    for use in (
        "import torch.nn.functional as F; assert F is torch.nn.functional",
        "from torch import Tensor; assert Tensor is torch.Tensor",
        "from torch.nn import Linear; assert Linear is torch.nn.Linear and Linear(2, 2)(torch.ones(2)).shape == (2,)",
        "from torch.utils._python_dispatch import TorchDispatchMode",
        "assert torch.__version__",  # safetensors asks first
    ):
        _run(
            _LATE + f"import torch; assert is_deferred()\n{use}\nassert not is_deferred()\n"
            "for name, module in sys.modules.items():\n"
            "    if name.startswith('torch.nn'): assert module.__spec__.name == name, name\n"
            "assert torch.nn is sys.modules['torch.nn'] and torch.ones(2).sum() == 2\n"
        )


def test_it_comes_lean_and_whole_as_it_would_at_once() -> None:
    names = "print(*sorted(name for name in sys.modules if name.startswith('torch')))"
    assert _run(f"{_LATE}import torch; torch.ones(1); {names}") == _run(_LEAN + names)


def test_what_waits_for_it_is_done_when_it_is_there() -> None:
    use = "when_imported(lambda: torch.set_num_threads(3))\n"
    _run(
        _LATE + "import torch; done = []\nwhen_imported(lambda: done.append(torch.get_num_threads()))\n"
        f"{use}when_imported(lambda: done.append(torch.get_num_threads()))\n"
        "assert not done and is_deferred()\n"
        "torch.ones(1); assert done[1:] == [3], done\n"
        "when_imported(lambda: done.append(1)); assert done[2:] == [1]\n"
    )
    _run(f"from penstock.lean_torch import when_imported; import torch\n{use}assert torch.get_num_threads() == 3\n")


def test_where_there_is_none_whoever_needs_it_is_told() -> None:
    _run(
        "from importlib.machinery import PathFinder\n"
        "from penstock.lean_torch import defer_torch, is_deferred\n"
        "find = PathFinder.find_spec\n"
        "PathFinder.find_spec = staticmethod(lambda name, *more: None if name == 'torch' else find(name, *more))\n"
        "defer_torch(); assert not is_deferred()\n"
        "try: import torch\n"
        "except ModuleNotFoundError: pass\n"
        "else: raise AssertionError\n"
    )
