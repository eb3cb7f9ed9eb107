"""What this machine has to give, as the kernel tells it."""

import os
from collections.abc import Iterator, Set
from pathlib import Path

_NO_LIMIT = 1 << 62
"""Version 1 control groups write a number near 2**63 for "no limit"."""


def available_memory_bytes(*, proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Return the memory this process could still take without swapping: the machine's or its control group's.

    The machine's is ``MemAvailable``; a control group, and each of its ancestors, gives its limit less what is
    used, where file pages that can be dropped do not count as used.
    """
    found = [_machine_available_bytes(proc)]
    names = ("memory.max", "memory.current", "inactive_file")
    for group in _groups(proc, cgroups, ""):
        found += _memory_left(group, *names)
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    for group in _groups(proc, cgroups, "memory"):
        found += _memory_left(group, *names)
    return max(0, min(found))


def usable_cores(
    *,
    cpus: Set[int] | None = None,
    proc: Path = Path("/proc"),
    cgroups: Path = Path("/sys/fs/cgroup"),
    topology: Path = Path("/sys/devices/system/cpu"),
) -> int:
    """Return how many cores this process may keep busy at once, at least one.

    Those of ``core_cpus``. A control group's time per period, which is how containers are limited, counts as that many
    cores, rounded down: more threads would be stopped in the middle of a step.
    """
    cores = [len(core_cpus(cpus=cpus, topology=topology))]
    for group in _groups(proc, cgroups, ""):
        cores += _quota(group / "cpu.max")
    for group in _groups(proc, cgroups, "cpu"):
        cores += _quota(group / "cpu.cfs_quota_us", group / "cpu.cfs_period_us")
    return max(1, min(cores))


def core_cpus(*, cpus: Set[int] | None = None, topology: Path = Path("/sys/devices/system/cpu")) -> list[int]:
    """Return a processor of each core, the first, of those this process may run on, in their order.

    These are ``cpus``; default: the scheduler's mask. Two threads of vector code on one core are no faster than one.
    """
    first: dict[str, int] = {}
    for cpu in sorted(os.sched_getaffinity(0) if cpus is None else cpus):
        siblings = topology / f"cpu{cpu}" / "topology" / "thread_siblings_list"
        first.setdefault(siblings.read_text().strip() if siblings.exists() else str(cpu), cpu)
    return list(first.values())


def _quota(*files: Path) -> list[int]:
    """Return the whole cores that a group's time, "microseconds period", makes; nothing if it has no limit."""
    try:
        quota, period = " ".join(file.read_text() for file in files).split()
    except (OSError, ValueError):
        return []
    return [] if quota in ("max", "-1") else [int(quota) // int(period)]


def _machine_available_bytes(proc: Path) -> int:
    for line in (proc / "meminfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) * 1024
    raise RuntimeError(f"{proc / 'meminfo'} has no MemAvailable line; Linux 3.14 or later writes one")


def _groups(proc: Path, cgroups: Path, controller: str) -> Iterator[Path]:
    """Yield this process's group and its ancestors up to the root: of version 1's ``controller``, "" for version 2.

    Inside a container the path may name a group that only the host sees; the root is then the container's own.
    """
    file = proc / "self" / "cgroup"
    for line in file.read_text().splitlines() if file.exists() else ():
        _, controllers, path = line.split(":", 2)
        if controller not in controllers.split(","):
            continue
        root = cgroups / controllers if (cgroups / controllers).is_dir() else cgroups / controller
        own = root / path.lstrip("/")
        yield from [group for group in (own, *own.parents) if group.is_relative_to(root)] or [root]


def _memory_left(group: Path, limit: str, usage: str, idle: str) -> list[int]:
    """Return the bytes that a group still allows; nothing if it has no limit."""
    try:
        text = (group / limit).read_text().strip()
        used = int((group / usage).read_text())
        stat = (group / "memory.stat").read_text()
    except OSError:
        return []
    if text == "max" or int(text) > _NO_LIMIT:
        return []
    idle_bytes = next((int(line.split()[1]) for line in stat.splitlines() if line.startswith(f"{idle} ")), 0)
    return [int(text) - used + idle_bytes]
