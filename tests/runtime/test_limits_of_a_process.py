"""The control group's limits, as both versions of the kernel's interface tell them, and the defaults they give."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dist_export.runtime.usage import default_host_memory, default_num_threads, memory_limit, num_cores, num_op_threads

GIB = 1 << 30


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_version_2_takes_the_least_of_all_groups_above(tmp_path: Path) -> None:
    write(tmp_path / "me", "0::/job/step\n")
    write(tmp_path / "fs/job/memory.max", f"{4 * GIB}\n")
    write(tmp_path / "fs/job/step/memory.max", "max\n")
    assert memory_limit(tmp_path / "fs", tmp_path / "me") == 4 * GIB


def test_version_2_in_a_container_that_sees_the_hosts_path(tmp_path: Path) -> None:
    write(tmp_path / "me", "0::/../../system.slice/docker-1.scope\n")
    write(tmp_path / "fs/memory.max", f"{2 * GIB}\n")
    write(tmp_path / "me2", "0::/docker/1\n")
    assert memory_limit(tmp_path / "fs", tmp_path / "me2") == 2 * GIB
    assert memory_limit(tmp_path / "fs", tmp_path / "me") == 2 * GIB


def test_version_1(tmp_path: Path) -> None:
    write(tmp_path / "me", "5:cpu,cpuacct:/job\n4:memory:/job\n0::/\n")
    write(tmp_path / "fs/memory/memory.limit_in_bytes", "9223372036854771712\n")
    assert memory_limit(tmp_path / "fs", tmp_path / "me") is None
    write(tmp_path / "fs/memory/job/memory.limit_in_bytes", f"{GIB}\n")
    assert memory_limit(tmp_path / "fs", tmp_path / "me") == GIB


def test_no_control_groups(tmp_path: Path) -> None:
    assert memory_limit(tmp_path, tmp_path / "none") is None


def test_half_of_the_limit_is_for_buffers() -> None:
    assert default_host_memory(4, limit=64 * GIB) == GIB
    assert default_host_memory(4, limit=4 * GIB) == GIB // 2
    assert default_host_memory(64, limit=GIB) == 64 << 20


def test_threads_leave_room_for_the_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    assert [default_num_threads(n) for n in (1, 4, 5, 8, 64)] == [2, 2, 1, 1, 1]
    monkeypatch.setattr("os.cpu_count", lambda: None)
    assert [default_num_threads(n) for n in (1, 2)] == [2, 1]


@pytest.fixture
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    monkeypatch.setattr("os.sched_getaffinity", lambda _pid: set(range(8)))


@pytest.mark.usefixtures("eight_cores")
@pytest.mark.parametrize(("above", "own", "expected"), [
    ("max 100000", "max 100000", 8), ("max 100000", "150000 100000", 2), ("400000 100000", "max 100000", 4),
    ("100000 100000", "600000 100000", 1), ("10000 100000", "max 100000", 1), ("", "nonsense", 8),
])  # fmt: skip
def test_cpu_time_of_version_2(above: str, own: str, expected: int, tmp_path: Path) -> None:
    write(tmp_path / "me", "0::/job/step\n")
    write(tmp_path / "fs/job/cpu.max", above + "\n")
    write(tmp_path / "fs/job/step/cpu.max", own + "\n")
    assert num_cores(tmp_path / "fs", tmp_path / "me") == expected


@pytest.mark.usefixtures("eight_cores")
def test_cpu_time_of_version_1(tmp_path: Path) -> None:
    write(tmp_path / "me", "5:cpu,cpuacct:/job\n4:memory:/job\n0::/\n")
    assert num_cores(tmp_path / "fs", tmp_path / "me") == 8
    for group, time in (("", "-1"), ("job/", "250000")):
        write(tmp_path / "fs/cpu" / group / "cpu.cfs_quota_us", time + "\n")
        write(tmp_path / "fs/cpu" / group / "cpu.cfs_period_us", "100000\n")
    assert num_cores(tmp_path / "fs", tmp_path / "me") == 3


def test_cores_that_a_process_may_not_run_on_do_not_count() -> None:
    program = "from dist_export.runtime.usage import num_cores; print(num_cores())"
    core = min(os.sched_getaffinity(0))
    command = ["taskset", "--cpu-list", str(core), sys.executable, "-c", program]
    assert subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout == "1\n"


@pytest.mark.usefixtures("eight_cores")
def test_threads_of_an_operation_share_the_cores() -> None:
    assert [num_op_threads(*each) for each in ((1, 1), (1, 2), (2, 2), (4, 1), (8, 1), (64, 2))] == [8, 4, 2, 2, 1, 1]
