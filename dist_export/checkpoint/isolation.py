"""Parses large metadata in a process of its own, so that a hostile file costs that process and not the node.

The look before parsing (`pickle_scan`) bounds what a pickle can claim by its size, but a file of a gigabyte is
bounded by hundreds of them. The child limits its own address space and processor time before it opens the file,
builds the chunk table and leaves it in memory that the parent maps; nothing but arrays and a JSON header crosses.

    python -m dist_export.checkpoint.isolation FOLDER OUTPUT_DESCRIPTOR MEMORY SECONDS
"""

from __future__ import annotations

import mmap
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dist_export.checkpoint.index import CheckpointIndex
from dist_export.errors import ExportError

MEMORY_VARIABLE = "DIST_EXPORT_METADATA_MEMORY"
"""Environment variable: bytes of memory that parsing a checkpoint's metadata may take."""
_BASE_MEMORY = 1 << 30  # bytes: the interpreter and numpy map about a third of it
_MEMORY_PER_BYTE = 16  # of metadata; 300 000 chunks with save plans inside take 7
_BASE_SECONDS, _SECONDS_PER_MIB = 60.0, 4.0  # it takes 0.1 s per MiB on a slow core
_REFUSED, _OUT_OF_MEMORY = 2, 4
"""Exit codes of the child: the checkpoint is at fault and standard error says why; the memory limit was met."""


@dataclass(frozen=True, slots=True)
class ParseLimits:
    """What parsing the metadata of one checkpoint may cost."""

    memory: int
    """Bytes of address space of the parsing process, the interpreter's included."""
    seconds: float
    """Of processor time, and twice that on the clock."""

    @classmethod
    def for_size(cls, num_bytes: int) -> ParseLimits:
        """Defaults for `num_bytes` of metadata: 1 GiB and 16 bytes per byte (or what `MEMORY_VARIABLE` says)."""
        asked = os.environ.get(MEMORY_VARIABLE, "")
        if asked and not asked.isdecimal():
            raise ExportError(f"{MEMORY_VARIABLE}={asked!r} is not a number of bytes")
        memory = int(asked) if asked else _BASE_MEMORY + _MEMORY_PER_BYTE * num_bytes
        return cls(memory, _BASE_SECONDS + _SECONDS_PER_MIB * num_bytes / (1 << 20))


def index_in_child(folder: Path, *, limits: ParseLimits | None = None) -> CheckpointIndex:
    """The chunk table of a ``torch_dist`` iteration folder, parsed by a child process within `limits`.

    Raises `ExportError` for what the child found wrong with the checkpoint, and, naming file and limit, where it
    ran out of memory or time or was killed.
    """
    path = folder / ".metadata"
    limits = limits or ParseLimits.for_size(path.stat().st_size)
    descriptor = os.memfd_create("dist_export index", os.MFD_CLOEXEC)
    try:
        _run_child(path, descriptor, limits)
        size = os.fstat(descriptor).st_size
        if not 0 < size <= limits.memory:
            raise ExportError(f"{path}: the process that parses it left {size} bytes, at most {limits.memory} expected")
        buffer = mmap.mmap(descriptor, size, prot=mmap.PROT_READ)
    finally:
        os.close(descriptor)
    return CheckpointIndex.from_buffer(buffer, origin=str(path))


def _run_child(path: Path, descriptor: int, limits: ParseLimits) -> None:
    command = [sys.executable, "-m", __name__, os.path.abspath(path.parent), str(descriptor)]
    command += [str(limits.memory), str(limits.seconds)]
    try:
        child = subprocess.run(
            command,
            cwd=Path(__file__).parents[2],  # where this package is found, installed or not
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
            pass_fds=[descriptor],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            timeout=2 * limits.seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise ExportError(f"{path}: parsing it took more than {2 * limits.seconds:g} s and was stopped") from None
    except OSError as error:
        raise ExportError(f"{path}: cannot start a process to parse it: {error.strerror}") from error
    if child.returncode != 0:
        raise ExportError(_reason(path, child.returncode, child.stderr.decode(errors="replace"), limits))


def _reason(path: Path, code: int, said: str, limits: ParseLimits) -> str:
    """Why the child failed, for the user."""
    advice = f"if you trust this checkpoint, allow more with {MEMORY_VARIABLE}=BYTES"
    if code == _REFUSED:
        return said.strip()
    if code == _OUT_OF_MEMORY:
        return f"{path}: parsing it needs more than the {limits.memory} bytes of memory it may take; {advice}"
    if code == -signal.SIGXCPU:
        return f"{path}: parsing it took more than {limits.seconds:g} s of processor time and was stopped"
    if code < 0:
        name = signal.Signals(-code).name
        return (
            f"{path}: the process that parses it was killed by {name} (limit: {limits.memory} bytes of memory); "
            "the file is malformed, or this machine is out of memory"
        )
    last = (said.strip().splitlines() or ["nothing on standard error"])[-1]
    return f"{path}: the process that parses it failed with exit code {code}: {last}"


def main(arguments: Sequence[str]) -> int:
    """The child. Returns its exit code; the table is written to the inherited descriptor."""
    folder, descriptor, memory, seconds = arguments
    _limit(int(memory), float(seconds))
    try:
        from dist_export.checkpoint.torch_dist import parse_index

        table = memoryview(parse_index(Path(folder)).to_bytes())
        while table:
            table = table[os.write(int(descriptor), table) :]
    except ExportError as error:
        if _ran_out(error):
            return _OUT_OF_MEMORY
        sys.stderr.write(f"{error}\n")
        return _REFUSED
    except MemoryError:
        return _OUT_OF_MEMORY
    return 0


def _limit(memory: int, seconds: float) -> None:
    for kind, most in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, memory),
        (resource.RLIMIT_CPU, int(seconds) + 1),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(kind)[1]
        if hard != resource.RLIM_INFINITY:
            most = min(most, hard)
        resource.setrlimit(kind, (most, most))


def _ran_out(error: BaseException | None) -> bool:
    """Whether a MemoryError is among what led to `error`."""
    while error is not None and not isinstance(error, MemoryError):
        error = error.__context__
    return error is not None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
