"""The memory a process may take is the smallest of what the machine and its control groups allow."""

import os
from collections.abc import Iterable
from pathlib import Path

import pytest

from penstock.estimate import available_memory_bytes, usable_cores
from penstock.estimate.system import core_cpus

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


@pytest.fixture
def topology(tmp_path: Path) -> Path:
    """Four cores of two processors each: 0 and 4, 1 and 5, ..."""
    for cpu in range(8):
        directory = tmp_path / "cpu" / f"cpu{cpu}" / "topology"
        directory.mkdir(parents=True)
        (directory / "thread_siblings_list").write_text(f"{cpu % 4},{cpu % 4 + 4}\n")
    return tmp_path / "cpu"


@pytest.mark.parametrize(("cpus", "num_cores"), [(range(8), 4), (range(4), 4), ([0, 4], 1), ([1, 4, 5], 2)])
def test_processors_of_one_core_count_once(
    proc: Path, tmp_path: Path, topology: Path, cpus: Iterable[int], num_cores: int
) -> None:
    assert usable_cores(cpus=set(cpus), proc=proc, cgroups=tmp_path / "none", topology=topology) == num_cores


@pytest.mark.parametrize(("cpus", "first"), [(range(8), [0, 1, 2, 3]), ([7, 5, 4, 1], [1, 4, 7]), ([6], [6])])
def test_a_core_is_known_by_its_first_processor(topology: Path, cpus: Iterable[int], first: list[int]) -> None:
    assert core_cpus(cpus=set(cpus), topology=topology) == first


def test_without_a_topology_every_processor_is_a_core(proc: Path, tmp_path: Path) -> None:
    assert usable_cores(cpus={0, 1, 2}, proc=proc, cgroups=tmp_path / "none", topology=tmp_path / "none") == 3


@pytest.mark.parametrize(("quota", "num_cores"), [("250000", 2), ("50000", 1), ("900000", 4), ("max", 4)])
def test_a_containers_time_is_so_many_cores(
    proc: Path, tmp_path: Path, topology: Path, quota: str, num_cores: int
) -> None:
    (proc / "self" / "cgroup").write_text("0::/pod/box\n")
    (tmp_path / "pod" / "box").mkdir(parents=True)
    (tmp_path / "pod" / "cpu.max").write_text(f"{quota} 100000\n")
    assert usable_cores(cpus=set(range(8)), proc=proc, cgroups=tmp_path, topology=topology) == num_cores


@pytest.mark.parametrize(("quota", "num_cores"), [("150000", 1), ("-1", 4)])
def test_a_containers_time_in_version_one(
    proc: Path, tmp_path: Path, topology: Path, quota: str, num_cores: int
) -> None:
    (proc / "self" / "cgroup").write_text("5:cpu,cpuacct:/pod\n4:memory:/pod\n")
    group = tmp_path / "cpu,cpuacct" / "pod"
    group.mkdir(parents=True)
    (group / "cpu.cfs_quota_us").write_text(f"{quota}\n")
    (group / "cpu.cfs_period_us").write_text("100000\n")
    assert usable_cores(cpus=set(range(8)), proc=proc, cgroups=tmp_path, topology=topology) == num_cores


def test_this_machine_has_cores() -> None:
    assert 1 <= usable_cores() <= len(os.sched_getaffinity(0))
