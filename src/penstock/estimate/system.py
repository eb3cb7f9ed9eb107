"""What this machine has to give, as the kernel tells it."""

from pathlib import Path

_NO_LIMIT = 1 << 62
"""Version 1 control groups write a number near 2**63 for "no limit"."""


def available_memory_bytes(*, proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Return the memory this process could still take without swapping: the machine's or its control group's.

    The machine's is ``MemAvailable``; a control group, and each of its ancestors, gives its limit less what is
    used, where file pages that can be dropped do not count as used.
    """
    found = [_machine_available_bytes(proc)]
    for line in (proc / "self" / "cgroup").read_text().splitlines() if (proc / "self" / "cgroup").exists() else ():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            found += _limits_bytes(cgroups, path, limit="memory.max", usage="memory.current", idle="inactive_file")
        elif "memory" in controllers.split(","):
            found += _limits_bytes(
                cgroups / "memory",
                path,
                limit="memory.limit_in_bytes",
                usage="memory.usage_in_bytes",
                idle="total_inactive_file",
            )
    return max(0, min(found))


def _machine_available_bytes(proc: Path) -> int:
    for line in (proc / "meminfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) * 1024
    raise RuntimeError(f"{proc / 'meminfo'} has no MemAvailable line; Linux 3.14 or later writes one")


def _limits_bytes(root: Path, path: str, *, limit: str, usage: str, idle: str) -> list[int]:
    """Return what each limited group from ``path`` up to the root still allows.

    Inside a container ``path`` may name a group that only the host sees; the root is then the container's own.
    """
    own = root / path.lstrip("/")
    groups = [group for group in (own, *own.parents) if group.is_relative_to(root)] or [root]
    allowed = []
    for group in groups:
        try:
            text = (group / limit).read_text().strip()
            used = int((group / usage).read_text())
            stat = (group / "memory.stat").read_text()
        except OSError:
            continue
        if text == "max" or int(text) > _NO_LIMIT:
            continue
        idle_bytes = next((int(line.split()[1]) for line in stat.splitlines() if line.startswith(f"{idle} ")), 0)
        allowed.append(int(text) - used + idle_bytes)
    return allowed
