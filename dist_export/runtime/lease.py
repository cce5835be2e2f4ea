"""A lease on an output: two exports into one place would mix their files.

The lease is a small file in the staging folder that its owner renews. It does not outlive its owner and
needs no file locks, which shared file systems often lack: an owner on this machine is looked up among
the processes, one on another machine is taken for dead when its lease stops changing. Only rank 0 of a
run holds one.

Leases are numbered. Whoever finds a dead one creates the next number, which only one process can; so of
several that find it, one wins, and nobody can remove a lease that is not the one it has looked at. An
owner renews the file that it created through its descriptor, wherever the folder is moved, so one that
slept and lost its lease meanwhile never touches its successor's.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import socket
import threading
import time
from collections.abc import Mapping
from pathlib import Path

from dist_export.errors import ExportError

NAME = "lease.json"
"""The first lease of a folder; later ones have a number behind."""
RENEW_S = 1.0
STALE_AFTER_S = 10.0  # without a renewal; above what a slow file system delays a small write

_CONTENT_BYTES = 512  # every renewal has the same length, so that a reader never sees a part of one


class Lease:
    """The right to write into a staging folder. Renewed by a thread until `release`."""

    def __init__(self, folder: Path, number: int) -> None:
        """Create lease `number` of a folder. Raises FileExistsError when somebody has it, OSError otherwise."""
        self.token = secrets.token_hex(8)
        self._name = f"{NAME}.{number}" if number else NAME
        self._descriptor = os.open(folder / self._name, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        self._beat = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        try:
            self._write()
        except OSError:
            os.close(self._descriptor)
            (folder / self._name).unlink(missing_ok=True)
            raise

    @classmethod
    def acquire(cls, folder: Path, *, stale_after_s: float = STALE_AFTER_S) -> Lease:
        """Take the lease of an existing staging folder.

        Waits up to `stale_after_s` to see whether an owner on another machine is alive. Raises `ExportError`
        naming the owner when it is, or when another run takes the lease at the same time.
        """
        found = {path: _read(path) for path in leases(folder)}
        last = max(found, key=_number, default=None)
        holder = found[last] if last is not None else None
        if last is not None and holder is not None and _is_alive(last, holder, stale_after_s):
            raise ExportError(
                f"{folder}: another export to this output is running (process {holder.get('pid')} on "
                f"{holder.get('host')}); wait for it, stop it, or choose another output"
            )
        try:
            lease = cls(folder, 0 if last is None else _number(last) + 1)
        except (FileExistsError, FileNotFoundError):
            raise ExportError(f"{folder}: another export to this output has just started or ended") from None
        except OSError as error:
            raise ExportError(f"{folder}: cannot write: {error.strerror}") from error
        lease._replace(folder, found)
        lease._thread.start()
        return lease

    def _replace(self, folder: Path, found: Mapping[Path, dict[str, object] | None]) -> None:
        """Remove the dead leases; give way when one of them is not what it was, or when there is another."""
        dead = [path for path, holder in found.items() if _read(path) in (None, holder)]
        for path in dead:
            path.unlink(missing_ok=True)
        if [path.name for path in leases(folder)] != [self._name]:
            self.release(folder)
            raise ExportError(f"{folder}: another export to this output has just started")

    def is_held(self, folder: Path) -> bool:
        """Whether `folder` is still this lease's: nobody has taken it over."""
        holder = _read(folder / self._name)
        return holder is not None and holder.get("token") == self.token

    def check(self, folder: Path) -> None:
        """Raise `ExportError` when another run has taken the lease; called before publishing."""
        if not self.is_held(folder):
            raise ExportError(f"{folder}: another export took over this output; this one publishes nothing")

    def release(self, folder: Path) -> None:
        """Stop renewing and remove the lease from `folder`, unless it was taken over. May be called again."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        if self.is_held(folder):
            (folder / self._name).unlink(missing_ok=True)
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _renew(self) -> None:
        while not self._stop.wait(RENEW_S):
            self._beat += 1
            with contextlib.suppress(OSError):  # a slow or broken disk: the work itself will say so
                self._write()

    def _write(self) -> None:
        os.pwrite(self._descriptor, self._content().encode().ljust(_CONTENT_BYTES), 0)
        os.fdatasync(self._descriptor)

    def _content(self) -> str:
        return json.dumps(
            {
                "token": self.token,
                "host": socket.gethostname(),
                "boot": _boot_id(),
                "pid": os.getpid(),
                "started": _process_start(os.getpid()),
                "beat": self._beat,
            }
        )


def leases(folder: Path) -> list[Path]:
    """The leases in a folder, of which the last counts. More than one is left by a run that died taking over."""
    return sorted((path for path in folder.glob(f"{NAME}*") if _number(path) >= 0), key=_number)


def is_held(folder: Path, *, stale_after_s: float = STALE_AFTER_S) -> bool:
    """Whether a living run holds the lease of a folder."""
    there = leases(folder)
    holder = _read(there[-1]) if there else None
    return holder is not None and _is_alive(there[-1], holder, stale_after_s)


def _number(path: Path) -> int:
    match = re.fullmatch(re.escape(NAME) + r"(?:\.(\d{1,9}))?", path.name)
    return -1 if match is None else int(match[1] or 0)


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
        started = _process_start(pid) if isinstance(pid, int) else None
        return started is not None and started == holder.get("started")
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
    """Tells the machine since its start, and where it is divided into containers which of them: processes that
    have it in common see one another's numbers."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return secrets.token_hex(8)  # nobody can be looked up: judge by renewals


def _process_start(pid: int) -> int | None:
    """When a living process started, in clock ticks since boot: tells it from a later one with its number."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] in "ZX" else int(fields[19])  # a zombie is dead, whoever has not waited for it
    except (OSError, IndexError, ValueError):
        return None
