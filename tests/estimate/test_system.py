"""The memory a process may take is the smallest of what the machine and its control groups allow."""

from pathlib import Path

import pytest

from penstock.estimate import available_memory_bytes

MIB = 1024**2


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "meminfo").write_text("MemTotal: 99999999 kB\nMemAvailable:    1048576 kB\nBuffers: 1 kB\n")
    return tmp_path / "proc"


def write_group(directory: Path, names: tuple[str, str, str], limit: str, used: int, idle: int) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / names[0]).write_text(f"{limit}\n")
    (directory / names[1]).write_text(f"{used}\n")
    (directory / "memory.stat").write_text(f"anon 12345\n{names[2]} {idle}\nslab 1\n")


V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
V2 = ("memory.max", "memory.current", "inactive_file")


def test_without_groups_it_is_the_machines(proc: Path, tmp_path: Path) -> None:
    assert available_memory_bytes(proc=proc, cgroups=tmp_path / "none") == 1024 * MIB


def test_a_group_allows_its_limit_less_what_cannot_be_dropped(proc: Path, tmp_path: Path) -> None:
    (proc / "self" / "cgroup").write_text("0::/pod/box\n")
    write_group(tmp_path / "pod" / "box", V2, str(500 * MIB), 300 * MIB, 50 * MIB)
    assert available_memory_bytes(proc=proc, cgroups=tmp_path) == 250 * MIB


def test_an_ancestor_may_be_stricter(proc: Path, tmp_path: Path) -> None:
    (proc / "self" / "cgroup").write_text("0::/pod/box\n")
    write_group(tmp_path / "pod" / "box", V2, "max", 300 * MIB, 0)
    write_group(tmp_path / "pod", V2, str(400 * MIB), 300 * MIB, 0)
    assert available_memory_bytes(proc=proc, cgroups=tmp_path) == 100 * MIB


def test_the_groups_of_version_one(proc: Path, tmp_path: Path) -> None:
    (proc / "self" / "cgroup").write_text("5:cpu,cpuacct:/pod\n4:memory:/pod\n")
    write_group(tmp_path / "memory" / "pod", V1, str(700 * MIB), 100 * MIB, 20 * MIB)
    write_group(tmp_path / "memory", V1, str(9223372036854771712), 100 * MIB, 0)
    assert available_memory_bytes(proc=proc, cgroups=tmp_path) == 620 * MIB


def test_a_container_that_cannot_see_its_own_path_reads_the_root(proc: Path, tmp_path: Path) -> None:
    (proc / "self" / "cgroup").write_text("4:memory:/docker/0123abcd\n")
    write_group(tmp_path / "memory", V1, str(64 * MIB), 32 * MIB, 0)
    assert available_memory_bytes(proc=proc, cgroups=tmp_path) == 32 * MIB


def test_a_group_over_its_limit_leaves_nothing(proc: Path, tmp_path: Path) -> None:
    (proc / "self" / "cgroup").write_text("0::/\n")
    write_group(tmp_path, V2, str(10 * MIB), 20 * MIB, 0)
    assert available_memory_bytes(proc=proc, cgroups=tmp_path) == 0


def test_this_machine() -> None:
    assert 0 < available_memory_bytes() < 1 << 50
