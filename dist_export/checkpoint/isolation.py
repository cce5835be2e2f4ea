"""Parses pickles in a process of its own, so that a hostile file costs that process and not the node.

The look before parsing (`pickle_scan`) bounds what a pickle can claim by its size, but a file of a gigabyte is
bounded by hundreds of them. The child limits its own address space and, per file, its time before it opens anything,
and leaves what it made of each file in memory that the parent maps: a chunk table, or values of the few kinds that
`hand_over` lets through. One child reads all files of a checkpoint, one after the other.

    python -m dist_export.checkpoint.isolation FUNCTION OUTPUT_DESCRIPTOR MEMORY SECONDS < ITEMS
"""

from __future__ import annotations

import importlib
import json
import mmap
import os
import resource
import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from msgspec import Struct

from dist_export.errors import ExportError

IN_PROCESS_BYTES = 2 << 20
"""Most bytes of pickles that are parsed without a process of their own. No opcode that the look before parsing lets
through costs more than about 230 bytes of memory per byte, so the worst such file costs half a gigabyte."""
MEMORY_VARIABLE = "DIST_EXPORT_METADATA_MEMORY"
"""Environment variable: bytes of memory that parsing a file of a checkpoint may take."""
_BASE_MEMORY = 1 << 30  # bytes: the interpreter and numpy map about a third of it
_MEMORY_PER_BYTE = 16  # of metadata; 300 000 chunks with save plans inside take 7
_BASE_SECONDS, _SECONDS_PER_MIB = 60.0, 4.0  # it takes 0.1 s per MiB on a slow core
_REFUSED, _OUT_OF_MEMORY = 2, 4
"""Exit codes of the child: the checkpoint is at fault and standard error says why; the memory limit was met."""
_PACKAGE = f"{__package__}."
_FRAME = struct.Struct("<Q")  # bytes of a result; frames and results begin on multiples of 64 bytes
_ALIGNMENT = 64

Item = list[str | int]
"""What the child's function is called with, once per file."""


class ParseLimits(Struct, frozen=True):
    """What parsing one file of a checkpoint may cost."""

    memory: int
    """Bytes of address space of the parsing process, the interpreter's included."""
    seconds: float
    """Of processor time per file, and twice that on the clock."""

    @classmethod
    def for_size(cls, num_bytes: int) -> ParseLimits:
        """Defaults for files of at most `num_bytes`: 1 GiB and 16 bytes per byte (or what `MEMORY_VARIABLE` says)."""
        asked = os.environ.get(MEMORY_VARIABLE, "")
        if asked and not asked.isdecimal():
            raise ExportError(f"{MEMORY_VARIABLE}={asked!r} is not a number of bytes")
        memory = int(asked) if asked else _BASE_MEMORY + _MEMORY_PER_BYTE * num_bytes
        return cls(memory, _BASE_SECONDS + _SECONDS_PER_MIB * num_bytes / (1 << 20))


def in_child(
    function: Callable[..., bytes], items: Sequence[Item], *, names: Sequence[str], limits: ParseLimits
) -> Iterator[memoryview]:
    """What `function`, of a module of this package, returns for each of `items` in a child process within `limits`.

    The results are slices of memory that the child filled. `names` are those of the files, for errors. Raises
    `ExportError` for what the child found wrong with the checkpoint, and, naming file and limit, where it ran out of
    memory or time or was killed.
    """
    descriptor = os.memfd_create("dist_export index", os.MFD_CLOEXEC)
    try:
        reason = _run_child(function, items, descriptor, limits)
        size = os.fstat(descriptor).st_size
        buffer = mmap.mmap(descriptor, size, prot=mmap.PROT_READ) if size else b""
    finally:
        os.close(descriptor)
    results = _frames(memoryview(buffer))
    if reason is not None or len(results) != len(items):
        name = names[min(len(results), len(names) - 1)]
        raise ExportError(reason(name) if reason else f"{name}: the process that parses it left no result")
    return iter(results)


def _run_child(
    function: Callable[..., bytes], items: Sequence[Item], descriptor: int, limits: ParseLimits
) -> Callable[[str], str] | None:
    """Run the child to its end. Returns None when it succeeded, else what to say of the file that it was at."""
    command = [sys.executable, "-m", __name__, f"{function.__module__}:{function.__qualname__}", str(descriptor)]
    command += [str(limits.memory), str(limits.seconds)]
    try:
        child = subprocess.run(
            command,
            cwd=Path(__file__).parents[2],  # where this package is found, installed or not
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
            pass_fds=[descriptor],
            input=json.dumps(items).encode(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            timeout=2 * limits.seconds * len(items),
            check=False,
        )
    except subprocess.TimeoutExpired:
        return lambda name: _too_slow(name, limits)
    except OSError as error:
        text = f"cannot start a process to parse it: {error.strerror}"
        return lambda name: f"{name}: {text}"
    if child.returncode == 0:
        return None
    said = child.stderr.decode(errors="replace")
    return lambda name: _reason(name, child.returncode, said, limits)


def _too_slow(name: str, limits: ParseLimits) -> str:
    return f"{name}: parsing it took more than {2 * limits.seconds:g} s and was stopped"


def _reason(name: str, code: int, said: str, limits: ParseLimits) -> str:
    """Why the child failed, for the user."""
    advice = f"if you trust this checkpoint, allow more with {MEMORY_VARIABLE}=BYTES"
    if code == _REFUSED:
        return said.strip()
    if code == _OUT_OF_MEMORY:
        return f"{name}: parsing it needs more than the {limits.memory} bytes of memory it may take; {advice}"
    if code == -signal.SIGXCPU:
        return f"{name}: parsing it took more than {limits.seconds:g} s of processor time and was stopped"
    if code == -signal.SIGALRM:
        return _too_slow(name, limits)
    if code < 0:
        killer = signal.Signals(-code).name
        return (
            f"{name}: the process that parses it was killed by {killer} (limit: {limits.memory} bytes of memory); "
            "the file is malformed, or this machine is out of memory"
        )
    last = (said.strip().splitlines() or ["nothing on standard error"])[-1]
    return f"{name}: the process that parses it failed with exit code {code}: {last}"


def _frames(buffer: memoryview) -> list[memoryview]:
    """The results that the child has left, whole ones only."""
    found, position = [], 0
    while position + _ALIGNMENT <= len(buffer):
        (length,) = _FRAME.unpack_from(buffer, position)
        start = position + _ALIGNMENT
        if length > len(buffer) - start:
            break
        found.append(buffer[start : start + length])
        position = start + length + -length % _ALIGNMENT
    return found


def main(arguments: Sequence[str]) -> int:
    """The child. Returns its exit code; results are written to the inherited descriptor."""
    named, descriptor, memory, seconds = arguments
    module, _, name = named.partition(":")
    assert module.startswith(_PACKAGE), f"{module} is no module of {_PACKAGE}"
    _limit(int(memory))
    try:
        function = getattr(importlib.import_module(module), name)
        for item in json.load(sys.stdin):
            _allow(float(seconds), most_bytes=int(memory) + os.fstat(int(descriptor)).st_size)
            _leave(int(descriptor), function(*item))
    except ExportError as error:
        if _ran_out(error):
            return _OUT_OF_MEMORY
        sys.stderr.write(f"{error}\n")
        return _REFUSED
    except MemoryError:
        return _OUT_OF_MEMORY
    return 0


def _leave(descriptor: int, result: bytes) -> None:
    """Write a frame: its length, then the result. The length counts only with all of what it announces."""
    head = _FRAME.pack(len(result)).ljust(_ALIGNMENT, b"\0")
    for part in (head, result, b"\0" * (-len(result) % _ALIGNMENT)):
        rest = memoryview(part)
        while rest:
            rest = rest[os.write(descriptor, rest) :]


def _limit(memory: int) -> None:
    _set_limit(resource.RLIMIT_AS, memory)
    _set_limit(resource.RLIMIT_CORE, 0)


def _set_limit(kind: int, most: int) -> None:
    hard = resource.getrlimit(kind)[1]
    resource.setrlimit(kind, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def _allow(seconds: float, *, most_bytes: int) -> None:
    """Time for one more file, after which the kernel ends the process, and bytes of all results with its own."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    _set_limit(resource.RLIMIT_CPU, int(used.ru_utime + used.ru_stime + seconds) + 1)
    _set_limit(resource.RLIMIT_FSIZE, most_bytes)
    signal.setitimer(signal.ITIMER_REAL, 2 * seconds)


def _ran_out(error: BaseException | None) -> bool:
    """Whether a MemoryError is among what led to `error`."""
    while error is not None and not isinstance(error, MemoryError):
        error = error.__context__
    return error is not None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
