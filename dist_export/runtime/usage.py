"""What a process has used, as the operating system counts it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Usage:
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


def _table(path: Path) -> dict[str, int]:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in lines if ":" in line)
    return {key: int(value.split()[0]) for key, value in pairs if value.split() and value.split()[0].isdigit()}
