"""A lease on an output: two exports into one place would mix their files.

The lease is a small file in the staging folder that its owner renews. It does not outlive its owner and
needs no file locks, which shared file systems often lack: an owner on this machine is looked up among
the processes, one on another machine is taken for dead when its lease stops changing. Only rank 0 of a
run holds one.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
import time
from pathlib import Path

from dist_export.errors import ExportError

NAME = "lease.json"
RENEW_S = 1.0
STALE_AFTER_S = 10.0  # without a renewal; above what a slow file system delays a small write


class Lease:
    """The right to write into a staging folder. Renewed by a thread until `release`."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / NAME
        self.token = secrets.token_hex(8)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)

    @classmethod
    def acquire(cls, folder: Path, *, stale_after_s: float = STALE_AFTER_S) -> Lease:
        """Take the lease of an existing staging folder.

        Waits up to `stale_after_s` to see whether an owner on another machine is alive. Raises `ExportError`
        naming the owner when it is.
        """
        lease = cls(folder)
        holder = _read(lease._path)
        if holder is not None:
            if _is_alive(lease._path, holder, stale_after_s):
                raise ExportError(
                    f"{folder}: another export to this output is running (process {holder.get('pid')} on "
                    f"{holder.get('host')}); wait for it, stop it, or choose another output"
                )
            lease._remove_stale()
        lease._create(folder)
        lease._thread.start()
        return lease

    def check(self) -> None:
        """Raise `ExportError` when another run has taken the lease; called before publishing."""
        holder = _read(self._path)
        if holder is None or holder.get("token") != self.token:
            raise ExportError(f"{self._path.parent}: another export took over this output; this one publishes nothing")

    def release(self) -> None:
        """Stop renewing and remove the lease, unless the folder was moved or taken over. May be called again."""
        self._stop.set()
        self._thread.join()
        holder = _read(self._path)
        if holder is not None and holder.get("token") == self.token:
            self._path.unlink(missing_ok=True)

    def _create(self, folder: Path) -> None:
        try:
            descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            raise ExportError(f"{folder}: another export to this output has just started") from None
        with os.fdopen(descriptor, "w") as file:
            file.write(self._content(0))

    def _remove_stale(self) -> None:
        """Of several runs that find a stale lease, the one whose rename succeeds goes on."""
        grave = self._path.with_name(f"{NAME}.{self.token}")
        try:
            os.rename(self._path, grave)
        except FileNotFoundError:
            raise ExportError(f"{self._path.parent}: another export to this output has just started") from None
        grave.unlink()

    def _renew(self) -> None:
        beat = 0
        while not self._stop.wait(RENEW_S):
            beat += 1
            holder = _read(self._path)
            if holder is None or holder.get("token") != self.token:
                return  # lost: `check` says so before anything is published
            fresh = self._path.with_name(f"{NAME}.{self.token}.new")
            try:
                fresh.write_text(self._content(beat))
                os.replace(fresh, self._path)
            except OSError:
                continue  # a full disk: the next renewal may succeed, and the work itself will say so

    def _content(self, beat: int) -> str:
        return json.dumps(
            {
                "token": self.token,
                "host": socket.gethostname(),
                "boot": _boot_id(),
                "pid": os.getpid(),
                "started": _process_start(os.getpid()),
                "beat": beat,
            }
        )


def is_held(folder: Path, *, stale_after_s: float = STALE_AFTER_S) -> bool:
    """Whether a living run holds the lease of a folder."""
    holder = _read(folder / NAME)
    return holder is not None and _is_alive(folder / NAME, holder, stale_after_s)


def _read(path: Path) -> dict[str, object] | None:
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return {}  # unreadable or being written: its owner shows by changing it
    return value if isinstance(value, dict) else {}


def _is_alive(path: Path, holder: dict[str, object], stale_after_s: float) -> bool:
    if holder.get("host") == socket.gethostname() and holder.get("boot") == _boot_id():
        pid = holder.get("pid")
        return isinstance(pid, int) and _process_start(pid) == holder.get("started")
    end = time.monotonic() + stale_after_s
    while time.monotonic() < end:
        time.sleep(0.25)
        now = _read(path)
        if now is None:
            return False
        if now != holder:
            return True
    return False


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _process_start(pid: int) -> int | None:
    """When a process started, in clock ticks since boot: tells a process from a later one with its number."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, IndexError, ValueError):
        return None
