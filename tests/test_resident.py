"""What starting leaves in memory, in a process of its own."""

import json
import subprocess
import sys

import pytest

_MEASURE = """
import json
from pathlib import Path
import torch
from penstock.resident import give_back

def resident():
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(lines["VmRSS"].split()[0])

kept = [bytes(100_000) for _ in range(1000)]
del kept[:-1]  # below what stays
before = resident()
give_back()
after = resident()
assert torch.tensor([[1.0, 2.0]]).mm(torch.ones(2, 1)).item() == 3.0
print(json.dumps([before, after]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="mappings are read as Linux shows them")
def test_what_importing_torch_ran_is_given_back() -> None:
    done = subprocess.run([sys.executable, "-c", _MEASURE], capture_output=True, text=True, check=True)
    before, after = json.loads(done.stdout)
    # What was freed, and most of torch's code.
    assert after < before - 100e6
