"""The control group's memory limit, as both versions of the kernel's interface tell it, and the default it gives."""

from __future__ import annotations

from pathlib import Path

import pytest

from dist_export.runtime.usage import default_host_memory, default_num_threads, memory_limit

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
