"""Which compiled code runs, and what it refuses to touch."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from penstock.errors import KernelUnsupported
from penstock.kernels import CPUOps
from penstock.kernels.linear.cpu import PackedLinear
from penstock.kernels.native import INSTRUCTION_SETS, NATIVE, checked
from tests.kernels.backends import instruction_sets, needs_native, using

LACKING = [isa for isa in INSTRUCTION_SETS if isa not in instruction_sets()]


def kernels_with(value: str) -> subprocess.CompletedProcess[str]:
    """Return what a Python with PENSTOCK_KERNELS set says it runs."""
    return subprocess.run(
        [sys.executable, "-c", "import penstock.kernels; print(penstock.kernels.describe())"],
        env={**os.environ, "PENSTOCK_KERNELS": value},
        capture_output=True,
        text=True,
        check=False,
    )


@needs_native
@pytest.mark.parametrize("wanted", [*instruction_sets(), "reference"])
def test_the_environment_chooses(wanted: str) -> None:
    assert kernels_with(wanted).stdout.strip() == wanted


def test_an_unknown_choice_is_refused_by_name() -> None:
    result = kernels_with("sse9")
    assert result.returncode != 0
    assert f"PENSTOCK_KERNELS is 'sse9'; it can be {', '.join(INSTRUCTION_SETS)} or reference" in result.stderr


@needs_native
def test_the_best_that_runs_is_the_default() -> None:
    assert kernels_with("").stdout.strip() == instruction_sets()[0]


@needs_native
@pytest.mark.skipif(not LACKING, reason="this processor runs every instruction set")
def test_code_that_the_processor_lacks_is_refused() -> None:
    result = kernels_with(LACKING[0])
    assert result.returncode != 0
    assert f"this processor cannot run the {LACKING[0]} kernels" in result.stderr


@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(3, 4, dtype=torch.float64),
        torch.zeros(3, 4, dtype=torch.bfloat16),
        torch.zeros(4, 3).t(),
        torch.zeros(3, 5),
        torch.zeros(12),
        torch.zeros(1, 3, 4),
    ],
    ids=["wide dtype", "narrow dtype", "transposed", "size", "rank below", "rank above"],
)
def test_what_does_not_fit_is_refused(x: torch.Tensor) -> None:
    with pytest.raises(KernelUnsupported, match=r"takes a dense float32 tensor of \[any, 4\]"):
        checked(x, "float32", -1, 4)


@needs_native
def test_ops_refuse_rather_than_crash() -> None:
    ops = CPUOps()
    with pytest.raises(KernelUnsupported):
        ops.rms_norm(torch.zeros(2, 8), torch.ones(7), 1e-5)
    with pytest.raises(KernelUnsupported):
        ops.prepare_linear(torch.zeros(4, 4, dtype=torch.float16), None)
    with pytest.raises(KernelUnsupported):
        ops.prepare_linear(torch.zeros(0, 4), None)
    with pytest.raises(KernelUnsupported):
        ops.prepare_gated_linear(torch.zeros(4, 4), torch.zeros(3, 4), None, None)
    linear = ops.prepare_linear(torch.zeros(4, 4), torch.zeros(4))
    with pytest.raises(KernelUnsupported):
        linear(torch.zeros(2, 5))
    with pytest.raises(KernelUnsupported):
        linear(torch.zeros(2, 4), torch.zeros(2, 5))


REFUSED = """
import resource
from penstock.errors import InvalidSetting
from penstock.kernels.native import NATIVE, use_threads
use_threads(2)
with open("/proc/self/statm") as statm:
    mapped = int(statm.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (mapped + (100 << 20), resource.RLIM_INFINITY))  # a stack is 8 MB
try:
    use_threads(200)
except InvalidSetting as error:
    print(error)
print(NATIVE.num_threads(1), NATIVE.multiply_add_rate("float32") > 0)
"""


@needs_native
def test_threads_that_the_system_refuses_are_an_error_of_the_setting() -> None:
    result = subprocess.run([sys.executable, "-c", REFUSED], capture_output=True, text=True, check=True)
    error, state = result.stdout.splitlines()
    assert error.startswith("the system refuses to start 200 threads (")
    assert "lower runner.threads (--threads)" in error
    assert state == "2 True"


NO_ROOM = """
import resource, numpy, torch
from penstock.kernels import CPUOps
from penstock.kernels.sampling import DrawRow, draw_tokens
product, x = CPUOps().prepare_linear(torch.ones(4, 4), None), torch.ones(1, 4)
product(x)
logits = numpy.zeros((1, 16 << 20), dtype=numpy.float32)
with open("/proc/self/statm") as statm:
    mapped = int(statm.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (mapped + (16 << 20), resource.RLIM_INFINITY))
try:
    draw_tokens(logits, [DrawRow(0.5, 1.0, 0, 0.9, 0.0)])
except MemoryError:
    print(product(x).tolist())
"""


@needs_native
def test_ops_go_on_after_one_that_there_was_no_room_for() -> None:
    result = subprocess.run([sys.executable, "-c", NO_ROOM], capture_output=True, text=True, check=True)
    assert result.stdout == "[[4.0, 4.0, 4.0, 4.0]]\n"


@needs_native
def test_threads_but_the_callers_stay_where_they_are_tied() -> None:
    assert NATIVE is not None
    own = os.sched_getaffinity(0)
    cpu = max(own)
    with using(NATIVE.isa(), 1):
        others = set(os.listdir("/proc/self/task"))
        NATIVE.set_num_threads(4, 4, [cpu, 4095])  # there is no such processor, and a third is not said
        started = [os.sched_getaffinity(int(task)) for task in set(os.listdir("/proc/self/task")) - others]
        assert sorted(started, key=len) == sorted([{cpu}, own, own], key=len)
        assert os.sched_getaffinity(0) == own


@needs_native
def test_engines_on_several_threads_share_the_pool() -> None:
    assert NATIVE is not None
    weight = torch.randn(512, 256)
    linear = PackedLinear(weight, None)
    inputs = torch.randn(5, 256), torch.randn(9, 256)
    with using(NATIVE.isa(), 3):
        expected = [linear(x) for x in inputs]
        wrong: list[int] = []

        def hammer() -> None:
            wrong.extend(i for i in range(300) if not torch.equal(linear(inputs[i % 2]), expected[i % 2]))

        threads = [threading.Thread(target=hammer) for _ in range(3)]
        for thread in threads:
            thread.start()
        for num_threads in (1, 4, 2, 3) * 5:
            NATIVE.set_num_threads(num_threads, max(1, num_threads - 1), [])
        for thread in threads:
            thread.join()
    assert not wrong


@needs_native
def test_few_rows_leave_a_thread_asleep_and_many_wake_it() -> None:
    assert NATIVE is not None
    linear = PackedLinear(torch.randn(2048, 1024), None)
    one, many = torch.randn(1, 1024), torch.randn(64, 1024)
    with using(NATIVE.isa(), 1):
        others = set(os.listdir("/proc/self/task"))
        NATIVE.set_num_threads(2, 1, [])
        (second,) = set(os.listdir("/proc/self/task")) - others

        def switches() -> int:
            """Return how often the second thread has gone to sleep."""
            lines = Path(f"/proc/self/task/{second}/status").read_text().splitlines()
            return int(next(line for line in lines if line.startswith("voluntary_ctxt_switches")).split()[1])

        def runs_again(x: torch.Tensor, num_calls: int) -> bool:
            before = switches()
            for _ in range(num_calls):
                linear(x)
                if switches() > before:
                    return True
            return False

        assert NATIVE.num_threads(1) == 1
        assert NATIVE.num_threads(64) == 2
        for _ in range(3):
            deadline = time.monotonic() + 60
            while runs_again(one, 200):
                assert time.monotonic() < deadline, "it does not go to sleep"
            assert runs_again(many, 100_000)
            assert torch.equal(linear(many)[:1], linear(many[:1].clone()))

        # Repeated steps try now and then whether it would be of use.
        repeated = torch.randn(4, 1024)
        tape = NATIVE.Tape(4, 1)
        tape.begin()
        out = linear(repeated)
        tape.end()
        before = switches()
        for _ in range(5000):
            tape.run(1, 1)
            assert torch.equal(out[:1], linear(repeated[:1].clone()))
            if switches() > before:
                break
        else:
            pytest.fail("it is never tried")
