"""The output files as one process of a run works on them: in the staging folder, or first on its node's own disk.

With a folder of the node's own, the processes of a node write there, and when all have, each copies what it wrote to
its place in the staging folder (`StagedFiles.gather`). The checksums noted at writing are checked while copying. Both
folders have journals: what is in the staging folder already is there for good, wherever a resumed run finds itself;
what lies on a node is used if the same node makes the same file again, and made again otherwise.
"""

from __future__ import annotations

import hashlib
import json
import socket
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from isal.isal_zlib import crc32
from msgspec import Struct, field

from dist_export.convert.journal import FOLDER as JOURNALS
from dist_export.convert.journal import Done, Journal, confirmed, read_journals
from dist_export.convert.ledger import PIECE_BYTES, Ledger, Run, TensorKey, merged
from dist_export.convert.outputs import OutputFile, WritableFile
from dist_export.errors import ExportError
from dist_export.plan.job import ExportJob
from dist_export.plan.placement import Placement
from dist_export.runtime.group import Group

COPY_BYTES = 4 << 20  # the buffer of a process that copies or digests

Runs = dict[TensorKey, list[Run]]


class RunFiles(Protocol):
    """What a session needs of the files it writes to; `StagedFiles` says what each is."""

    journal: Journal | None
    bytes_gathered: int

    @property
    def outputs(self) -> Mapping[int, WritableFile]: ...
    @property
    def owned(self) -> list[int]: ...
    def create(self, *, resumed: bool) -> None: ...
    def share_found(self) -> Runs: ...
    def open(self, numbers: Iterable[int]) -> Mapping[int, WritableFile]: ...
    def hand_over(self, ledger: Ledger) -> None: ...
    def gather(self, ledger: Ledger) -> None: ...
    def sync(self) -> None: ...
    def sha256(self, number: int) -> str: ...
    def close(self) -> None: ...


class StagedFiles(Struct):
    """The files that the processes of one node make, as one of these processes sees them."""

    job: ExportJob
    group: Group
    placement: Placement
    shared: Path
    """The staging folder."""
    local: Path | None
    """This node's own folder, where there is one."""
    attempt: str
    """Names this run's journals."""
    outputs: dict[int, OutputFile] = field(default_factory=dict)
    """Where this process writes, by file number, once `open` was called."""
    journal: Journal | None = None
    bytes_gathered: int = 0
    _staged: Runs = field(default_factory=dict)
    """What an earlier run left in the staging folder, of files that this process owns."""
    _on_node: Runs = field(default_factory=dict)
    """What it left on this node beyond that."""
    _targets: dict[int, OutputFile] = field(default_factory=dict)
    """Files in the staging folder that this process copies to or owns."""

    @property
    def owned(self) -> list[int]:
        """The files that this process creates and finishes in the staging folder."""
        return self.placement.owned_by(self.group.rank)

    @property
    def folder(self) -> Path:
        """Where this process writes."""
        return self.local or self.shared

    def create(self, *, resumed: bool) -> None:
        """Create this process's files; those of an earlier run stay where `resumed`, and are read back."""
        noted = read_journals(self.shared) if resumed else {}
        for number in self.owned:
            self._staged |= self._create(self.shared, number, noted)
        if self.local is None:
            return
        self._count(self._staged)  # a second time: these bytes need not be gathered any more
        staged = Done(self._staged)
        noted = {
            key: [run for run in runs if staged.missing(key, *run[:2]) == [run[:2]]]
            for key, runs in (read_journals(self.local) if resumed else {}).items()
        }
        for number in self._made_here():
            # What several nodes have of a file that they share is known to its owner only, and else made again.
            self._on_node |= self._create(self.local, number, noted if number in self.owned else {})

    def share_found(self) -> Runs:
        """What an earlier run left in all files, told to every process, since those of a node share work."""
        runs = (*self._staged.items(), *self._on_node.items())
        mine = json.dumps([[*key, merged(found)] for key, found in runs if found]).encode()
        gathered = self.group.gather("found", mine)
        whole = [entry for each in gathered for entry in json.loads(each)] if gathered is not None else None
        told = self.group.broadcast("done", None if whole is None else json.dumps(whole).encode())
        done: Runs = {}
        for file, index, found in json.loads(told):
            done.setdefault((file, index), []).extend((run[0], run[1], run[2]) for run in found)
        return done

    def open(self, numbers: Iterable[int]) -> dict[int, OutputFile]:
        """Open the files that this process writes to, and its journal. Returns `outputs`."""
        for number in sorted({*numbers, *self.owned}):
            self.outputs[number] = OutputFile(self.folder / self.job.path(number))
        self.journal = self._journal(self.folder)
        return self.outputs

    def hand_over(self, ledger: Ledger) -> None:
        """Put what an earlier run left into the ledger, but for what need not be gathered (see `gather`)."""
        for key, runs in (self._staged if self.local is None else self._on_node).items():
            ledger.take_over(key, runs)

    def gather(self, ledger: Ledger) -> None:
        """Copy what this process has on its node to the staging folder. Raises ExportError where it has changed."""
        assert self.local is not None and self.journal is not None
        self.journal.close()  # so that nothing written is done again where this is cut short
        self.journal = None
        # In pieces, since one is checked, and noted in the journal, as a whole.
        runs = ledger.runs(longest=PIECE_BYTES)
        for number in sorted({file for file, _ in runs} | set(self.owned)):
            self._targets[number] = OutputFile(self.shared / self.job.path(number))
        journal, buffer = self._journal(self.shared), memoryview(bytearray(COPY_BYTES))
        try:
            for key in sorted(runs):
                self._gather_tensor(key, runs[key], journal, buffer)
        finally:
            journal.close()
        for key, found in self._staged.items():
            ledger.take_over(key, found)

    def sync(self) -> None:
        """Wait until the files that this process owns are on disk, whichever processes wrote to them."""
        files = self.outputs if self.local is None else self._targets
        here, node = self.group.rank, self.placement.node_of_process
        for number, file in files.items():
            if node[self.placement.owners_of_file[number][0]] != node[here]:
                file.finish()  # the owner's sync reaches what its own node has in memory, no other's
        self.group.barrier("files written")
        for number in self.owned:
            files[number].finish()

    def sha256(self, number: int) -> str:
        """SHA-256 of a finished file in the staging folder, hexadecimal."""
        state = hashlib.sha256()
        with (self.shared / self.job.path(number)).open("rb") as file:
            while block := file.read(COPY_BYTES):
                state.update(block)
                self.group.progress.add(bytes_read=len(block))
                self.group.check()
        return state.hexdigest()

    def close(self) -> None:
        """Close everything. May be called again."""
        if self.journal is not None:
            self.journal.close()
        for file in (*self.outputs.values(), *self._targets.values()):
            file.close()

    def _create(self, folder: Path, number: int, noted: Mapping[TensorKey, Sequence[Run]]) -> Runs:
        """Create a file, or make one that is there ready to go on; returns the runs in it that are as noted."""
        shard, path = self.job.shard(number), folder / self.job.path(number)
        if not path.exists():
            OutputFile.create(path, shard.header, shard.num_data_bytes)
            return {}
        OutputFile.restore(path, shard.header, shard.num_data_bytes)
        found: Runs = {}
        for index, tensor in enumerate(shard.tensors):
            start = len(shard.header) + tensor.offset
            for run in confirmed(path, start, tensor.num_bytes, noted.get((number, index), ())):
                found.setdefault((number, index), []).append(run)
                self._count({(number, index): [run]})  # reading back takes a while: it is no standstill
                self.group.check()
        return found

    def _count(self, runs: Mapping[TensorKey, Sequence[Run]]) -> None:
        self.group.progress.add(bytes_written=sum(length for each in runs.values() for _, length, _ in each))

    def _made_here(self) -> list[int]:
        """The files that this process creates on its node: it is the first of the node's that make them."""
        node = self.placement.node_of_process
        firsts = [
            next((owner for owner in owners if node[owner] == node[self.group.rank]), None)
            for owners in self.placement.owners_of_file
        ]
        return [number for number, first in enumerate(firsts) if first == self.group.rank]

    def _journal(self, folder: Path) -> Journal:
        return Journal(folder / JOURNALS / f"{self.group.rank:05d}-{self.attempt}.txt")

    def _gather_tensor(self, key: TensorKey, runs: Sequence[Run], journal: Journal, buffer: memoryview) -> None:
        number, index = key
        shard = self.job.shard(number)
        start = len(shard.header) + shard.tensors[index].offset
        for run in runs:
            self._gather_run(number, start + run[0], run, buffer)
            journal.note(key, run)  # not before it is checked: a resumed run takes it for right

    def _gather_run(self, number: int, start: int, run: Run, buffer: memoryview) -> None:
        _, length, expected = run
        checksum, position = 0, start
        for data in self.outputs[number].read(start, length, buffer):
            checksum = int(crc32(data, checksum))
            self._targets[number].write_at(position, data)
            position += data.nbytes
            self.bytes_gathered += data.nbytes
            self.group.progress.add(bytes_written=data.nbytes)
            self.group.check()
        if position != start + length or checksum != expected:
            raise ExportError(
                f"{self.outputs[number].path} on {socket.gethostname()}: bytes {start} to {start + length} are not "
                f"what rank {self.group.rank} wrote there (checksum {checksum:08x}, expected {expected:08x}); the disk "
                "is faulty, or another program has changed the file"
            )
