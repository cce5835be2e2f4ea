"""One process of a node reads a checkpoint's metadata, the others map what it made of them.

The chunk table goes into anonymous memory (`memfd_create`, sealed), which the processes of the node open through
``/proc``: nothing has a name in a file system, so nothing is left behind whatever happens to the run.
"""

from __future__ import annotations

import fcntl
import json
import mmap
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msgspec import Struct, to_builtins

from dist_export.checkpoint.index import CheckpointIndex
from dist_export.checkpoint.open import Checkpoint, checkpoint_of, open_checkpoint
from dist_export.runtime.group import Group

if TYPE_CHECKING:
    from dist_export.api import Source


class _Published(Struct, frozen=True):
    """Where the processes of one node find the table."""

    node: str
    path: str
    num_bytes: int


def open_together(source: Source, group: Group) -> Checkpoint:
    """The checkpoint that `source` names, as `open_checkpoint` opens it, with the metadata parsed once per node.

    All ranks of `group` call it.

    Where a process cannot map the table (no /proc, another container), it reads the metadata itself. Raises
    `ExportError` on the process that reads, when the checkpoint is at fault, and PeerFailedError on the others.
    """
    parts: dict[str, Any] = {
        "iteration": source.iteration, "base": source.base, "master_weights": source.master_weights,
    }  # fmt: skip
    if group.world_size == 1:
        return open_checkpoint(source.checkpoint, index_cache=source.index_cache, **parts)
    descriptor, mine, checkpoint = -1, None, None
    try:
        if group.world.local_rank == 0:
            checkpoint = open_checkpoint(source.checkpoint, index_cache=source.index_cache, **parts)
            if group.world.local_world_size > 1:
                table = checkpoint.index.to_bytes()
                descriptor = _sealed_memory(table)
                mine = _Published(_node(), f"/proc/{os.getpid()}/fd/{descriptor}", len(table))
        everywhere = _exchange(group, mine)
        if checkpoint is None:
            index = next((found for each in everywhere if (found := _mapped(each)) is not None), None)
            checkpoint = open_checkpoint(source.checkpoint, **parts) if index is None else checkpoint_of(index)
        group.barrier("index mapped")
    finally:
        if descriptor >= 0:
            os.close(descriptor)
    return checkpoint


def _exchange(group: Group, mine: _Published | None) -> list[_Published]:
    """What the first process of every node published."""
    gathered = group.gather("index of each node", b"" if mine is None else json.dumps(to_builtins(mine)).encode())
    merged = None if gathered is None else b"[" + b",".join(each for each in gathered if each) + b"]"
    return [_Published(**each) for each in json.loads(group.broadcast("indices", merged))]


def _node() -> str:
    """The same text in processes that see one another in /proc: the machine's boot and the process id namespace."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return ""


def _sealed_memory(data: bytes) -> int:
    """A descriptor of anonymous memory that holds `data` and that nobody can change or shrink any more."""
    descriptor = os.memfd_create("dist_export index", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
    seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    return descriptor


def _mapped(published: _Published) -> CheckpointIndex | None:
    """The published table, or None where this process cannot see it."""
    if not published.node or published.node != _node():
        return None
    try:
        with open(published.path, "rb") as file:
            if os.fstat(file.fileno()).st_size != published.num_bytes:
                return None
            buffer = mmap.mmap(file.fileno(), published.num_bytes, prot=mmap.PROT_READ)
    except OSError:
        return None
    return CheckpointIndex.from_buffer(buffer)
