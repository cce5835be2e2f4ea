"""One process's part of a refit: the transfer of an export, but what differs from the old files goes to logs."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from msgspec import to_builtins

from dist_export.agreement import Agreement
from dist_export.convert.journal import read_fingerprint
from dist_export.convert.outputs import write_error
from dist_export.errors import ExportError
from dist_export.manifest import CollectedReports
from dist_export.plan.export import ExportPlan
from dist_export.plan.placement import Placement
from dist_export.refit import redo
from dist_export.refit.base import Base, content_digest
from dist_export.refit.delta import DOCUMENTS, Delta, DeltaFile, DeltaFolder, document_digests
from dist_export.refit.files import Changes, ComparedFiles, RefitFiles
from dist_export.runtime import publication
from dist_export.runtime.publication import MANIFEST
from dist_export.scale_phase import KEPT
from dist_export.session import ExportSession
from dist_export.staged_files import RunFiles

PREPARED = "refit"
"""In the staging folder: what becomes the redo folder."""
GRAVE = "applied"


class RefitStaging(publication.Staging):
    """The staging folder of a refit. What an interrupted one left there is of no use."""

    def abandon(self, *, keep: bool) -> None:
        """Remove it, whatever ended the run."""
        super().abandon(keep=False)


def open_staging(output: Path) -> RefitStaging:
    """Take the staging folder of an output and prepare it. Raises `ExportError` when another run needs it."""
    folder = publication.staging_folder(output)
    if read_fingerprint(folder) is not None:
        raise ExportError(
            f"{folder}: an export to {output} is running, or was stopped and can be resumed; finish it "
            "(dist-export export --resume), or remove that folder"
        )
    staging = RefitStaging(output)
    try:
        staging.clear()
        for name in (redo.LOGS, redo.DOCUMENTS):
            (staging.folder / PREPARED / name).mkdir(parents=True)
    except OSError as error:
        staging.abandon(keep=False)
        raise write_error(staging.folder, error) from error
    except BaseException:
        staging.abandon(keep=False)
        raise
    return staging


@dataclass(slots=True)
class RefitSession(ExportSession):
    """The state of one refit in one process. Its `options.output` is where it writes: the old output, or a delta."""

    base: Base = field(kw_only=True)
    all_names: bool = False
    """Put unchanged tensors into the delta too."""
    _files_made: RefitFiles | None = None

    @property
    def makes_delta(self) -> bool:
        """Whether the old output stays as it is."""
        return self.options.output != self.base.output

    @property
    def changes(self) -> Changes:
        """What was changed, after `run`."""
        assert self._files_made is not None
        return self._files_made.compared.changes

    def _prepare_staging(self) -> tuple[publication.Staging, bool]:
        """Rank 0: check that the new weights fit, and have the lease. Never continues an earlier run."""
        if self.makes_delta and os.path.ismount(self.options.output):
            raise ExportError(f"--delta-dir {self.options.output}: is a mount point; give a folder in it to create")
        staging = open_staging(self.options.output)
        try:
            self.base.check_current()
            self.base.check(self.job, in_place=not self.makes_delta)
            self._fingerprint()
            for plan in self.job.plans if self.makes_delta else ():
                (staging.folder / plan.folder / DOCUMENTS).mkdir(parents=True)
        except BaseException:
            staging.abandon(keep=False)
            raise
        return staging, False

    def _files(self, agreement: Agreement, placement: Placement, staging: Path, local: Path | None) -> RunFiles:
        compared = ComparedFiles(self.group, self.base.output, staging / PREPARED)
        delta = staging if self.makes_delta else None
        self._files_made = RefitFiles(self.job, placement, compared, delta, self.all_names)
        return self._files_made

    def _finish(self, collected: CollectedReports) -> None:
        """Rank 0: prove that every byte was compared, and make the documents; of a refit in place, commit."""
        assert self.staging is not None
        entries = self._checked_files(collected)
        self.base.check_current()
        (self.staging.folder / KEPT).unlink(missing_ok=True)
        folders = [self._documents(number, plan) for number, plan in enumerate(self.job.plans)]
        for folder, plan, files in zip(folders, self.job.plans, entries, strict=True):
            folder.mkdir(exist_ok=True)
            self._write_documents(folder, plan, files, collected, refit=self._provenance(plan))
        if not self.makes_delta:
            self.staging.lease.check(self.staging.folder)
            redo.commit(self.staging.folder / PREPARED, self.base.output, self._commit(folders))

    def _conclude(self) -> None:
        """All ranks: put the changes in place, or publish the delta."""
        if self.makes_delta:
            self._publish_delta()
        else:
            self.group.barrier("refit committed")
            grave = publication.staging_folder(self.base.output) / GRAVE
            redo.apply(self.base.output, self.group, grave=grave, step="refit")
            if self.staging is not None:
                self.staging.abandon(keep=False)

    def _documents(self, number: int, plan: ExportPlan) -> Path:
        """Where the documents of a plan are prepared. Rank 0."""
        assert self.staging is not None
        if self.makes_delta:
            return self.staging.folder / plan.folder / DOCUMENTS
        return self.staging.folder / PREPARED / redo.DOCUMENTS / str(number)

    def _provenance(self, plan: ExportPlan) -> dict[str, object]:
        old = self.base.folders[self.job.plans.index(plan)]
        numbers = self.job.numbered(plan)
        changed = sum(len(self.changes.tensors.get(number, ())) for number in numbers)
        return {"from_iteration": old.iteration, "num_tensors_changed": changed}

    def _commit(self, folders: Sequence[Path]) -> redo.Commit:
        paths = tuple(self.job.path(number) for number in range(self.job.num_files))
        changes = []
        for old, folder in zip(self.base.folders, folders, strict=True):
            gone = sorted(set(old.manifest.get("copied") or ()) - {path.name for path in folder.iterdir()})
            changes.append(old.change(folder, remove=gone))
        return redo.Commit(paths, self.changes.logs, tuple(changes))

    def _publish_delta(self) -> None:
        """All ranks: tell rank 0 what they wrote; it writes the index and publishes."""
        assert self._files_made is not None
        mine = json.dumps([to_builtins(each) for each in self._files_made.delta_files]).encode()
        gathered = self.group.gather("delta files", mine)
        if gathered is None or self.staging is None:
            return
        found = {each["number"]: DeltaFile(**each) for data in gathered for each in json.loads(data)}
        folder = self.staging.finish()
        folders = tuple(self._delta_folder(folder, plan, found) for plan in self.job.plans)
        Delta(self.options.output, folders).write(folder)
        shutil.rmtree(folder / PREPARED)
        self.staging.publish()

    def _delta_folder(self, folder: Path, plan: ExportPlan, found: Mapping[int, DeltaFile]) -> DeltaFolder:
        old = self.base.folders[self.job.plans.index(plan)]
        documents = folder / plan.folder / DOCUMENTS
        manifest = json.loads((documents / MANIFEST).read_text())
        files = {}
        for number in self.job.numbered(plan):
            if number in found:
                name = self.job.shard(number).file_name
                files[name] = {"num_bytes": found[number].num_bytes, "tensors": found[number].tensors}
                _check_same(name, found[number], manifest["files"][name]["tensors"])
        return DeltaFolder(
            folder=plan.folder,
            target=plan.target,
            base={"iteration": old.iteration, "content": old.content},
            new={"iteration": self.checkpoint.iteration, "content": content_digest(manifest)},
            files=files,
            documents=document_digests(documents),
        )


def _check_same(name: str, file: DeltaFile, tensors: Mapping[str, Mapping[str, object]]) -> None:
    """What was read back of the logs must be what was compared."""
    for tensor, entry in file.tensors.items():
        if entry["crc32"] != tensors[tensor]["crc32"]:
            raise ExportError(f"{name}: {tensor}: what was written is not what was read; the disk may be faulty")
