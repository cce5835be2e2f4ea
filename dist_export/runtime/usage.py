"""What a process has used, as the operating system counts it."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from msgspec import Struct


class Usage(Struct, frozen=True):
    """Counters of this process. Bytes; 0 where the system does not tell."""

    read_calls: int = 0
    """Bytes that read calls returned, from page cache or disk (``rchar``)."""
    disk_reads: int = 0
    """Bytes fetched from storage (``read_bytes``)."""
    peak_memory: int = 0
    """Largest resident size so far, mapped files included (``VmHWM``)."""
    memory: int = 0
    """Resident size now (``VmRSS``)."""

    @staticmethod
    def now() -> Usage:
        """The counters of the calling process."""
        counts = _table(Path("/proc/self/io"))
        status = _table(Path("/proc/self/status"))
        return Usage(
            read_calls=counts.get("rchar", 0),
            disk_reads=counts.get("read_bytes", 0),
            peak_memory=status.get("VmHWM", 0) * 1024,
            memory=status.get("VmRSS", 0) * 1024,
        )


def physical_memory() -> int:
    """Bytes of memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


#: Buffers of a process where no memory limit asks for less, and the least that still makes sense.
_MOST_BUFFERS, _LEAST_BUFFERS = 1 << 30, 64 << 20

_CGROUPS, _MEMBERSHIP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def default_num_threads(num_processes: int) -> int:
    """Threads for each of `num_processes` of this node: 2, of which one reads while the other writes.

    1 where the processes alone fill the cores: two threads would mostly wait for each other's turn in the interpreter.
    The node's cores are counted, not `num_cores`: srun and mpirun bind each rank to some of its own.
    """
    return 2 if 2 * num_processes <= (os.cpu_count() or 1) or num_processes == 1 else 1


def num_op_threads(num_processes: int, num_threads: int) -> int:
    """Threads within one operation of torch where each of `num_processes` of this node has `num_threads` that run some:
    the cores that are left for each. If every operation took all cores, those of different threads would mostly wait
    for one another: a cast of a model by two processes on two cores then takes ten times as long."""
    return max(num_cores() // (num_processes * num_threads), 1)


def num_cores(cgroups: Path = _CGROUPS, membership: Path = _MEMBERSHIP) -> int:
    """Cores that this process may keep busy: those it may run on (taskset, srun), or as many as the CPU time of its
    control groups is worth (containers), rounded up.

    Source: Documentation/admin-guide/cgroup-v2.rst (cpu.max) and scheduler/sched-bwc.rst (cpu.cfs_quota_us) of the
    Linux kernel.
    """
    worth = [os.cpu_count() or 1]
    if hasattr(os, "sched_getaffinity"):
        worth.append(len(os.sched_getaffinity(0)))
    for controllers, group in _memberships(membership):
        pairs: list[list[str]] = []
        if controllers == "":
            pairs = [text.split() for text in _texts(cgroups, group, "cpu.max")]
        elif "cpu" in controllers.split(","):
            times, periods = (_texts(cgroups / "cpu", group, f"cpu.cfs_{name}_us") for name in ("quota", "period"))
            pairs = [list(pair) for pair in zip(times, periods, strict=False)]
        # Without a limit the time says "max" (version 2) or -1 (version 1).
        worth += [-(-int(pair[0]) // int(pair[1])) for pair in pairs if len(pair) == 2 and all(map(_is_positive, pair))]
    return max(min(worth), 1)


def default_host_memory(num_processes: int, *, limit: int | None = None) -> int:
    """Bytes for the buffers of each of `num_processes` of this node: 1 GiB, or half of its share of `limit`.

    The other half is for the interpreter, torch and the page cache, all of which count against the limit.
    `limit` is by default that of this process's control group (`memory_limit`).
    """
    limit = memory_limit() if limit is None else limit
    if limit is None:
        return _MOST_BUFFERS
    return max(min(_MOST_BUFFERS, limit // (2 * num_processes)), _LEAST_BUFFERS)


def memory_limit(cgroups: Path = _CGROUPS, membership: Path = _MEMBERSHIP) -> int | None:
    """The least memory limit, in bytes, of the control groups this process is in; None where there is none.

    Source: Documentation/admin-guide/cgroup-v2.rst (memory.max) and cgroup-v1/memory.rst (memory.limit_in_bytes) of
    the Linux kernel. In a container the group's path may be the host's and absent; the root of the mount is its own.
    """
    texts: list[str] = []
    for controllers, group in _memberships(membership):
        if controllers == "":
            texts += _texts(cgroups, group, "memory.max")
        elif "memory" in controllers.split(","):
            texts += _texts(cgroups / "memory", group, "memory.limit_in_bytes")
    # Version 1 says "no limit" as the largest number of pages: about 2**63.
    return min((int(text) for text in texts if text.isdigit() and int(text) < 1 << 62), default=None)


def _is_positive(text: str) -> bool:
    return text.isdigit() and int(text) > 0


def _memberships(file: Path) -> list[tuple[str, str]]:
    """(controllers, group) of the control groups this process is in; version 2 has no controllers there."""
    try:
        lines = [line.split(":", 2) for line in file.read_text().splitlines()]
    except OSError:
        return []
    return [(line[1], line[2]) for line in lines if len(line) == 3]


def _texts(mount: Path, group: str, name: str) -> list[str]:
    """What a file says in a group and in all above it."""
    folder, found = mount / group.lstrip("/"), []
    for each in (folder, *folder.parents):
        if each == mount or mount in each.parents:
            with contextlib.suppress(OSError):
                found.append((each / name).read_text().strip())
    return found


def _table(path: Path) -> dict[str, int]:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in lines if ":" in line)
    return {key: int(value.split()[0]) for key, value in pairs if value.split() and value.split()[0].isdigit()}
