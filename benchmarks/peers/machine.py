"""The machine: what it is, how fast it reads memory at this moment, and how busy others keep it."""

import os
import platform
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.peers.peer import REPOSITORY

_READ_BYTES = 384 << 20
"""Several times what any level of cache holds."""


class Bandwidth:
    """Reads of a large array by several threads; numpy advises the kernel to back it with huge pages."""

    def __init__(self, threads: int) -> None:
        self._parts = np.array_split(np.ones(_READ_BYTES // 8, dtype=np.int64), threads)
        self._pool = ThreadPoolExecutor(threads)

    def measure(self) -> float:
        """Return bytes per second: the best of three reads, about 50 ms."""
        best = 0.0
        for _ in range(3):
            began = time.perf_counter()
            list(self._pool.map(np.sum, self._parts))
            best = max(best, _READ_BYTES / (time.perf_counter() - began))
        return best


def busy_s() -> float:
    """Return the processor time all processes of the machine have used."""
    times = psutil.cpu_times()
    return float(times.user + times.nice + times.system + times.irq + times.softirq)


def own_cpu_s() -> float:
    """Return the processor time this process has used."""
    times = os.times()
    return times.user + times.system


def source_commit() -> str:
    """Return the last commit that changed the package: the one that is measured, whatever benchmarks did since."""
    command = ["git", "log", "-1", "--format=%h", "--", "src"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, check=False)
    return done.stdout.strip() or "unknown"


def describe_machine() -> dict[str, Any]:
    """Return what a reader needs to compare."""
    info = Path("/proc/cpuinfo").read_text().splitlines()
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in info)}
    flags = set(facts.get("flags", "").split())
    wanted = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile")
    return {
        "processor": facts.get("model name", "?"),
        "vector_units": [flag for flag in wanted if flag in flags],
        "cores": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
    }
