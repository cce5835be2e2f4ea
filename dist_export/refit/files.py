"""The files of a refit as one process works on them: the old ones are compared with, the differences are logged."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from msgspec import Struct, field, to_builtins

from dist_export.convert.journal import Journal
from dist_export.convert.ledger import Ledger
from dist_export.plan.job import ExportJob
from dist_export.plan.placement import Placement
from dist_export.refit.blocks import BlockLog, ComparedFile, NewContent
from dist_export.refit.delta import DeltaFile, write_delta_file
from dist_export.refit.redo import LOGS
from dist_export.runtime.group import Group
from dist_export.runtime.watch import Watcher
from dist_export.staged_files import COPY_BYTES, Runs


class Changes(Struct):
    """What differs from the old export. On rank 0 of all processes together, elsewhere of this one."""

    num_blocks: int = 0
    num_bytes: int = 0
    tensors: dict[int, list[int]] = field(default_factory=dict)
    """File number -> numbers of the tensors with a changed byte."""
    logs: dict[str, int] = field(default_factory=dict)
    """Name of each log -> bytes of its blocks."""

    @property
    def num_tensors(self) -> int:
        return sum(map(len, self.tensors.values()))

    def encode(self) -> bytes:
        """As bytes for another rank."""
        return json.dumps(to_builtins(self)).encode()

    def add(self, _rank: int, data: bytes) -> None:
        """Take over what another rank encoded."""
        other = json.loads(data)
        self.num_blocks += other["num_blocks"]
        self.num_bytes += other["num_bytes"]
        self.logs |= other["logs"]
        for number, tensors in other["tensors"].items():
            self.tensors[int(number)] = sorted({*self.tensors.get(int(number), ()), *tensors})


class ComparedFiles(Struct):
    """Old files, the log of one process, and at the end what has changed in all of them."""

    group: Group
    old: Path
    """The output with the old export."""
    prepared: Path
    """The folder that becomes the redo folder."""
    changes: Changes = field(default_factory=Changes)
    files: dict[int, ComparedFile] = field(default_factory=dict)
    _log: BlockLog | None = None

    def open(self, files: Mapping[int, tuple[str, Sequence[int]]]) -> None:
        """Open the log, and files by number: (path in the output, where its tensors start)."""
        self._log = BlockLog(self.prepared / LOGS, f"{self.group.rank:05d}")
        for number, (path, starts) in files.items():
            self.files[number] = ComparedFile(number, self.old / path, self._log, starts)

    def finish(self) -> None:
        """Wait until the logs of all processes are on disk, and learn what they hold. All ranks call it."""
        assert self._log is not None
        self._log.finish()
        mine = Changes(
            self._log.num_blocks,
            self._log.num_bytes,
            {number: sorted(file.changed) for number, file in self.files.items() if file.changed},
            {self._log.name: self._log.num_bytes},
        )
        changes = Changes()
        self.group.gather_each("changes", mine.encode(), changes.add)
        told = self.group.broadcast("all changes", changes.encode() if self.group.rank == 0 else None)
        self.changes = Changes()
        self.changes.add(0, told)

    def close(self) -> None:
        """Close everything. May be called again."""
        if self._log is not None:
            self._log.close()
        for file in self.files.values():
            file.close()


class RefitFiles(Struct):
    """What `dist_export.session.ExportSession` writes to when it refits (`dist_export.staged_files.RunFiles`)."""

    job: ExportJob
    placement: Placement
    compared: ComparedFiles
    delta: Path | None = None
    """The folder for the changed tensors alone, where they are asked for."""
    all_names: bool = False
    """Put unchanged tensors there too."""
    delta_files: list[DeltaFile] = field(default_factory=list)
    """Those that this process has written."""
    journal: Journal | None = None
    bytes_gathered: int = 0

    @property
    def outputs(self) -> Mapping[int, ComparedFile]:
        """The old files, by number."""
        return self.compared.files

    @property
    def owned(self) -> list[int]:
        """The files that this process finishes."""
        return self.placement.owned_by(self.compared.group.rank)

    def create(self, *, resumed: bool) -> None:
        """Nothing: a refit that was interrupted is not resumed."""
        assert not resumed

    def share_found(self) -> Runs:
        """Nothing, likewise."""
        return {}

    def open(self, numbers: Iterable[int]) -> Mapping[int, ComparedFile]:
        """Open the old files to compare with, and the log."""
        starts = {}
        for number in sorted(numbers):
            shard = self.job.shard(number)
            data_start = len(shard.header)
            starts[number] = (self.job.path(number), [data_start + tensor.offset for tensor in shard.tensors])
        self.compared.open(starts)
        return self.outputs

    def hand_over(self, ledger: Ledger) -> None:
        """Nothing, likewise."""

    def gather(self, ledger: Ledger) -> None:
        """Never called: nothing is staged on the nodes' own disks."""
        raise AssertionError("a refit has no local staging")

    def sync(self) -> None:
        """Wait until all logs are on disk; then write the changed tensors of owned files, where asked for."""
        self.compared.finish()
        if self.delta is None:
            return
        for number in self.owned:
            shard, path = self.job.shard(number), self.job.path(number)
            changed = range(len(shard.tensors)) if self.all_names else self.compared.changes.tensors.get(number, ())
            if changed:
                kept = [shard.tensors[index] for index in changed]
                with self._new_content(number) as content:
                    watcher = Watcher(self.compared.group)
                    self.delta_files.append(
                        write_delta_file(self.delta / path, number, kept, len(shard.header), content, watcher)
                    )

    def sha256(self, number: int) -> str:
        """SHA-256 of what a file will hold, hexadecimal."""
        shard, state, buffer = self.job.shard(number), hashlib.sha256(), memoryview(bytearray(COPY_BYTES))
        size, offset = len(shard.header) + shard.num_data_bytes, 0
        watcher = Watcher(self.compared.group)
        with self._new_content(number) as content:
            while offset < size:
                part = buffer[: min(size - offset, COPY_BYTES)]
                content.read(offset, part)
                state.update(part)
                offset += part.nbytes
                watcher.progress(part.nbytes, 0)  # ranks that wait for this one time out without
        return state.hexdigest()

    def close(self) -> None:
        """Close everything. May be called again."""
        self.compared.close()

    def _new_content(self, number: int) -> NewContent:
        return NewContent(self.compared.old / self.job.path(number), number, self.compared.prepared / LOGS)
