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
