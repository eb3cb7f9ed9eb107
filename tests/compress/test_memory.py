"""What compressing takes of memory, in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny_models import make_checkpoint

_MEASURE = """
import json, sys
from pathlib import Path
from penstock.compress import output
from penstock.compress.calibration.texts import CalibrationOptions
from penstock.compress.recipe import NAMED
from penstock.compress.run import Compression, CompressOptions

def high_water():
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(lines["VmHWM"].split()[0])

# The files are written in shards, of which memory holds one: as small beside these models as it is beside real ones.
output._SHARD_BYTES = 1 << 20
model, out = map(Path, sys.argv[1:])
calibration = CalibrationOptions(num_samples=12, length=64, force=True)
options = CompressOptions(model=model, out=out, recipe=NAMED["w4a16-gptq"], calibration=calibration)
compression = Compression(options)
compression.run()
print(json.dumps([high_water(), compression.estimate.memory_bytes]))
"""
E, F = 256, 1024


def _peak_and_estimate(path: Path, num_layers: int, vocab_size: int = 320) -> tuple[int, int]:
    model = make_checkpoint(
        path / f"{num_layers}",
        "llama",
        hidden_size=E,
        intermediate_size=F,
        num_hidden_layers=num_layers,
        vocab_size=vocab_size,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=64,
    )
    command = [sys.executable, "-c", _MEASURE, str(model), str(path / f"out-{num_layers}")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=200)
    peak, estimated = json.loads(done.stdout)
    return int(peak), int(estimated)


@pytest.mark.slow
def test_peak_memory_does_not_grow_with_the_number_of_layers(tmp_path: Path) -> None:
    layer_bytes = 4 * (4 * E * E + 3 * E * F)
    shallow, deep = (_peak_and_estimate(tmp_path, num_layers)[0] for num_layers in (2, 26))
    # Held, the 24 layers more would take 24 times that in float32, twelve in 16 bits; runs of one model differ by five.
    assert deep - shallow < 10 * layer_bytes


@pytest.mark.slow
def test_the_estimate_is_near_the_peak(tmp_path: Path) -> None:
    # Table and head take more than the process, and layers less.
    peak, estimated = _peak_and_estimate(tmp_path, 2, vocab_size=150_000)
    assert 0.9 * peak <= estimated <= 1.4 * peak, "too much is asked for rather than too little"
