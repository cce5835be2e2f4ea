"""Commands under launchers: their end, the processes they leave, and the causes they print."""

from __future__ import annotations

import os
import re
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

LAYOUT = ("--tp", 2, "--dtype", "float32", "--host-memory", "64k", "--num-threads", 1)
"""What the tests of launchers export: tiles of 64 KiB, so that there are many."""


@dataclass(frozen=True)
class Ended:
    """How a launcher and all that it started ended."""

    code: int
    text: str
    """Standard output and error."""
    seconds: float
    """From the fault, if a rank said that it dies, to the end of all processes."""

    @property
    def causes(self) -> list[str]:
        """The causes printed, whatever the launcher puts before them."""
        return re.findall(r"dist-export: (?:internal )?error: .*", self.text)


def run(*command: object, marker: str, cwd: Path | None = None, limit_s: float = 90.0, **extra: str) -> Ended:
    """Run a launcher to its end and wait until no process has `marker` in its command line."""
    process = start(*command, cwd=cwd, **extra)
    return finish([process], marker=marker, limit_s=limit_s)[0]


def start(*command: object, cwd: Path | None = None, **extra: str) -> subprocess.Popen[str]:
    """Start a launcher in a process group of its own, its output in one pipe."""
    return subprocess.Popen(
        [str(each) for each in command], cwd=cwd, env={**os.environ, **extra}, text=True, start_new_session=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def finish(processes: list[subprocess.Popen[str]], *, marker: str, limit_s: float = 90.0) -> list[Ended]:
    """Wait for the end of several launchers of one run."""
    deadline, texts = time.monotonic() + limit_s, []
    try:
        for process in processes:
            texts.append(process.communicate(timeout=deadline - time.monotonic())[0])
        until = wait_until_gone(marker, limit_s=max(deadline - time.monotonic(), 1.0))
    except BaseException:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, 9)
                texts.append(process.communicate()[0])
        print(*texts, sep="\n")
        raise
    dying = died_at("".join(texts))
    seconds = until - dying if dying else 0.0
    return [Ended(each.returncode, text, seconds) for each, text in zip(processes, texts, strict=True)]


def died_at(text: str) -> float | None:
    """When a rank said that it would die, by the system's monotonic clock."""
    found = re.search(r" dies at ([0-9.]+)", text)
    return float(found[1]) if found else None


def wait_until_gone(marker: str, *, limit_s: float) -> float:
    """Return (with the time) when no living process has `marker` in its command line."""
    deadline = time.monotonic() + limit_s
    while alive := processes_with(marker):
        assert time.monotonic() < deadline, f"still running: {alive}"
        time.sleep(0.05)
    return time.monotonic()


def processes_with(marker: str) -> list[int]:
    """Living processes whose command line has `marker`."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and int(folder.name) != os.getpid():
            try:
                if marker in (folder / "cmdline").read_text() and "State:\tZ" not in (folder / "status").read_text():
                    found.append(int(folder.name))
            except OSError:
                continue
    return found
