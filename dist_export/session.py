"""One process's part of a distributed export, from plan to publication.

Every rank runs `ExportSession.run` with the same plan. Rank 0 also stages, gathers and publishes. A rank
that fails raises; the group makes every other rank stop within seconds, and nothing is published.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from msgspec import Struct, to_builtins

from dist_export import __version__
from dist_export.agreement import Agreement
from dist_export.checkpoint.open import Checkpoint
from dist_export.convert.execute import Executor
from dist_export.convert.journal import Done, read_fingerprint, remove_journals, write_fingerprint
from dist_export.convert.measuring import KeepingSources
from dist_export.convert.outputs import WritableFile
from dist_export.convert.profile import Profile
from dist_export.convert.remeasure import measure_done
from dist_export.convert.view_reader import ViewReader
from dist_export.documents import write_documents
from dist_export.errors import ExportError
from dist_export.local_staging import local_folder, make_local_folder, read_token, remove_local_folder, write_token
from dist_export.machinery import Resources, make_executor
from dist_export.manifest import (
    CollectedReports,
    RankReport,
    build_manifest,
    file_entries,
    holds_export,
    run_statistics,
)
from dist_export.plan.export import ExportPlan
from dist_export.plan.job import ExportJob
from dist_export.plan.placement import Placement, fills_of, work_of
from dist_export.plan.work import Fill, WorkItem, collect_uses
from dist_export.quantization_report import quantization_report
from dist_export.runtime import publication
from dist_export.runtime.failure import PeerFailedError, is_resumable
from dist_export.runtime.group import Group
from dist_export.runtime.usage import Usage, physical_memory
from dist_export.runtime.watch import Watcher
from dist_export.runtime.world import node_name
from dist_export.scale_phase import KEPT, FoundScales, find_scales
from dist_export.staged_files import RunFiles, StagedFiles


class RunOptions(Struct, frozen=True, kw_only=True):
    """How an export runs, apart from what it makes."""

    output: Path
    overwrite: bool = False
    resume: bool = False
    """Go on where an earlier run of the same export was stopped."""
    host_memory: int = 1 << 30
    """Bytes for buffers, per process."""
    device_memory: int = 2 << 30
    """Bytes of a GPU, per process."""
    num_threads: int = 2
    local_staging: Path | None = None
    """An existing folder on every node's own disk, to write the files in before they are gathered."""
    sha256: bool = False
    """Put SHA-256 of every tensor file into the manifest: reads each file back."""
    device: str = "auto"
    """For value operations: ``auto`` (a GPU where there is one), ``cpu`` or a torch device."""
    profile: Path | None = None
    """An existing folder for a timeline of every rank."""


@dataclass(slots=True)
class ExportSession:
    """The state of one run in one process."""

    checkpoint: Checkpoint
    job: ExportJob
    options: RunOptions
    group: Group
    request: Mapping[str, object] = field(default_factory=dict)
    """How the export was asked for, kept in the manifest."""
    report: RankReport = field(init=False)
    left_out: dict[str, dict[str, int]] = field(default_factory=dict)
    source_fingerprint: str = ""
    """Of the checkpoint's files, on rank 0 before the work began."""
    staging: publication.Staging | None = None
    """On rank 0, from the moment it has the lease."""
    profile: Profile = field(init=False)
    already_done: bool = False
    """After `run`: it found that the output is a published export of the same job."""
    _scales: FoundScales = field(default_factory=FoundScales)
    _local: Path | None = None
    """This node's own folder, in the process that removes it."""
    _stale: str = ""
    """Names the nodes' folders of an earlier run whose work is not used. On rank 0."""

    def __post_init__(self) -> None:
        self.profile = Profile(enabled=self.options.profile is not None)
        self.report = RankReport(self.group.rank, memory_at_start=Usage.now().memory)

    def run(self) -> list[RankReport]:
        """Export and publish. Returns every rank's report on rank 0, an empty list elsewhere. All ranks call it.

        With `resume`, an output that holds this very export already is left as it is (`already_done`).
        """
        group, started = self.group, Usage.now()
        group.check()
        try:
            agreement = self._agree()
            if agreement is None:
                self.already_done = True
                return []
            placement = agreement.placement()
            self._compare_digests(agreement, placement)
            executor = self._transfer(agreement, placement)
            self._fill_report(executor, started)
            collected = CollectedReports()
            group.gather_each("reports", self.report.encode(), collected.add)
            if group.rank == 0:
                self._finish(collected)
            self._conclude()
        except BaseException as error:
            # Not a signal: that may be a launcher's answer to the death of another rank, which the group finds out.
            if isinstance(error, Exception) and not isinstance(error, PeerFailedError):
                group.fail(error)  # before the files vanish, or the others would report that instead
            keep = is_resumable(error)
            if self.staging is not None:
                self.staging.abandon(keep=keep)
            if self._local is not None and not keep:
                remove_local_folder(self._local)
            raise
        with self.profile.span("wait"):
            group.barrier("published")
        if self.options.profile is not None:
            self.profile.write(self.options.profile / f"rank{group.rank}.json", rank=group.rank)
        if self._local is not None:
            remove_local_folder(self._local)
        return collected.reports

    def _agree(self) -> Agreement | None:
        """Rank 0 validates the plan and stages the output; every rank then knows its part of the same plan.

        None: there is nothing to do.
        """
        hosts = self.group.gather("hosts", node_name().encode())
        message = None
        if hosts is not None and self.options.resume and self._is_published():
            message = b"null"
        elif hosts is not None:
            publication.check_output(self.options.output, overwrite=self.options.overwrite)
            self.left_out = self.job.validate()
            self.staging, resumed = self._prepare_staging()
            files = self.job.summaries()
            agreement = Agreement(
                hosts=[host.decode() for host in hosts],
                costs=[file.num_data_bytes for file in files],
                digests=[file.digest for file in files],
                attempt=self.staging.lease.token,
                resumed=resumed,
                local=read_token(self.staging.folder) if self.options.local_staging is not None else "",
                stale=self._stale,
            )
            message = json.dumps(to_builtins(agreement)).encode()
        told = json.loads(self.group.broadcast("agreement", message))
        return None if told is None else Agreement(**told)

    def _fingerprint(self) -> dict[str, object]:
        """What a run must agree in with an earlier one to go on with its work. On rank 0."""
        self.source_fingerprint = self.source_fingerprint or self.checkpoint.fingerprint()
        return {"job": self.job.digest(), "source": self.source_fingerprint, "version": __version__}

    def _is_published(self) -> bool:
        """Whether the output is what this run would make, as far as its manifests and file sizes tell.

        Not where an export was being replaced: then the run that did it goes on.
        """
        output = self.options.output
        if self.options.overwrite and read_fingerprint(publication.staging_folder(output)) is not None:
            return False
        return all(
            holds_export(output / plan.folder, fingerprint=self._fingerprint(), request=self._request_of(plan))
            for plan in self.job.plans
        )

    def _request_of(self, plan: ExportPlan) -> dict[str, object]:
        return {**self.request, "target": plan.target, "options": plan.options}

    def _prepare_staging(self) -> tuple[publication.Staging, bool]:
        """Rank 0: keep what an earlier run of the same export wrote, or start afresh. Returns whether it is kept.

        A resume that is refused here leaves what it found to one that is not.
        """
        staging = publication.Staging(self.options.output)
        try:
            # Again, since until the lease was ours another run may have published there.
            publication.check_output(self.options.output, overwrite=self.options.overwrite)
            return staging, self._is_continued(staging)
        except BaseException:
            staging.abandon(keep=self.options.resume)
            raise

    def _is_continued(self, staging: publication.Staging) -> bool:
        fingerprint = self._fingerprint()
        there = read_fingerprint(staging.folder) if self.options.resume else None
        if there is not None and there != fingerprint:
            changed = ", ".join(key for key, value in fingerprint.items() if there.get(key) != value)
            raise ExportError(
                f"{self.options.output}: cannot resume, since what is exported has changed ({changed}); "
                "start again without --resume"
            )
        token = read_token(staging.folder)
        if there is None:
            staging.clear()
            write_fingerprint(staging.folder, fingerprint)
            self._stale, token = token, ""
        if self.options.local_staging is not None and not token:
            write_token(staging.folder, staging.lease.token)
        for plan in self.job.plans:
            (staging.folder / plan.folder).mkdir(exist_ok=True)
        return there is not None

    def _compare_digests(self, agreement: Agreement, placement: Placement) -> None:
        for number in placement.files_near(self.group.rank):
            own = self.job.summary(number).digest
            if own != agreement.digests[number]:
                raise ExportError(
                    f"rank {self.group.rank} plans {self.job.path(number)} differently from rank 0 (digests {own[:12]} "
                    f"and {agreement.digests[number][:12]}): the processes see different checkpoints or options"
                )

    def _work(self, placement: Placement) -> tuple[list[WorkItem], list[Fill]]:
        """This process's share: only files made on its node are planned."""
        rank, index = self.group.rank, self.checkpoint.index
        shards = {number: self.job.shard(number) for number in placement.files_near(rank)}
        slabs, fills = collect_uses(shards, self.job.catalog.tensors, updates=self.job.catalog.updates)
        items = work_of(rank, placement, slabs)
        items.sort(key=lambda item: index.first_place(item.slab.name, item.slab.box(item.shape)))
        return items, fills_of(rank, placement, fills)

    def _transfer(self, agreement: Agreement, placement: Placement) -> Executor:
        """Do this process's share of the work. What it owns is on disk when it returns."""
        staging = publication.staging_folder(self.options.output)
        local = self._make_local_folder(agreement)
        files = self._files(agreement, placement, staging, local)
        with self.profile.span("plan"):
            items, fills = self._work(placement)
        self._find_scales(items)
        files.create(resumed=agreement.resumed)
        done = files.share_found() if agreement.resumed else {}
        with self.profile.span("wait"):
            self.group.barrier("files created")
        needed = {use.output.file for item in items for use in item.uses} | {fill.output.file for fill in fills}
        try:
            executor = self._executor(files.open(needed), items, fills)
            executor.done, executor.journal, executor.profile = Done(done), files.journal, self.profile
            files.hand_over(executor.ledger)
            with closing(executor.sources), self._phase("transfer"):
                if executor.done and executor.encoder is not None:
                    measure_done(executor, items)
                executor.run(items, fills)
            if local is not None:
                with self._phase("gather"):
                    files.gather(executor.ledger)
            with self._phase("sync"):
                files.sync()
                if self.options.sha256:
                    for number in files.owned:
                        self.report.sha256[str(number)] = files.sha256(number)
        finally:
            files.close()
        self.report.bytes_read += executor.sources.num_bytes_read
        self.report.bytes_written = sum(output.num_bytes_written for output in files.outputs.values())
        self.report.bytes_gathered = files.bytes_gathered
        return executor

    def _files(self, agreement: Agreement, placement: Placement, staging: Path, local: Path | None) -> RunFiles:
        """Where this process's share of the work is written."""
        return StagedFiles(self.job, self.group, placement, staging, local, agreement.attempt)

    def _conclude(self) -> None:
        """What all ranks still do once rank 0 has finished: nothing."""

    def _make_local_folder(self, agreement: Agreement) -> Path | None:
        """This node's own folder, made by one of its processes; None where there is none."""
        parent, rank = self.options.local_staging, self.group.rank
        if (parent is None) == bool(agreement.local):
            raise ExportError(f"rank {rank} and rank 0 were not given --local-staging alike")
        if parent is None:
            return None
        folder = local_folder(parent, agreement.local)
        if agreement.is_first_of_node(rank):
            self._local = folder
            if agreement.stale:
                remove_local_folder(local_folder(parent, agreement.stale))
            make_local_folder(folder, self.job, output=self.options.output)
        self.group.barrier("local folders made")
        return folder

    def _executor(
        self, outputs: Mapping[int, WritableFile], items: Sequence[WorkItem], fills: Sequence[Fill]
    ) -> Executor:
        self.report.bytes_needed += sum(item.num_bytes_needed for item in items)
        self.report.bytes_needed += sum(fill.num_bytes_needed for fill in fills)
        total = sum(item.num_bytes_written for item in items) + sum(fill.num_bytes_written for fill in fills)
        self.group.progress.add(total=total if self.options.local_staging is None else 2 * total)
        index = self.checkpoint.index
        sources = KeepingSources(index, self._scales.kept, give_back=index.num_weight_bytes > physical_memory() // 4)
        return make_executor(
            outputs,
            (items, fills),
            ViewReader(sources, index.shapes(), self.job.catalog.updates),
            table=self._scales.table,
            resources=self._resources(),
            observer=Watcher(self.group),
        )

    def _resources(self) -> Resources:
        options = self.options
        return Resources(
            host_memory=options.host_memory,
            device_memory=options.device_memory,
            num_threads=options.num_threads,
            device=options.device,
            local_rank=self.group.world.local_rank,
            local_world_size=self.group.world.local_world_size,
        )

    def _find_scales(self, items: Sequence[WorkItem]) -> None:
        quantization = next((plan.quantization for plan in self.job.plans if plan.quantization), None)
        if quantization is None:
            return
        with self._phase("scales"):
            self._scales = find_scales(
                quantization,
                self.checkpoint.index,
                self.group,
                items=items,
                resources=self._resources(),
                staging=self.staging.folder if self.staging is not None else None,
            )
        self.report.bytes_needed += self._scales.bytes_needed
        self.report.bytes_read += self._scales.bytes_read

    def _fill_report(self, executor: Executor, started: Usage) -> None:
        now = Usage.now()
        self.report.bytes_read_by_calls = now.read_calls - started.read_calls
        self.report.bytes_read_from_disk = now.disk_reads - started.disk_reads
        self.report.peak_memory = now.peak_memory
        self.report.profile = dict(self.profile.sums())
        self.report.set_runs(executor.ledger.runs())
        if executor.encoder is not None:
            self.report.quality = executor.encoder.qualities.plain()

    def _finish(self, collected: CollectedReports) -> None:
        """Rank 0: prove that every byte was written, then write manifests and configurations and publish."""
        assert self.staging is not None
        files = self._checked_files(collected)
        folder = self.staging.finish()
        remove_journals(folder)
        (folder / KEPT).unlink(missing_ok=True)
        for plan, entries in zip(self.job.plans, files, strict=True):
            self._write_documents(folder / plan.folder, plan, entries, collected)
        self.staging.publish()

    def _checked_files(self, collected: CollectedReports) -> list[dict[str, object]]:
        """Rank 0: the manifest's entries of every plan's files. `ExportError` unless all is written, of one source."""
        self.group.enter_phase("publish")
        files = [file_entries(plan, self.job.numbered(plan), collected) for plan in self.job.plans]
        if self.checkpoint.fingerprint() != self.source_fingerprint:
            raise ExportError(f"{self.checkpoint.index.origin}: files changed during the export; start it again")
        return files

    def _write_documents(
        self, folder: Path, plan: ExportPlan, entries: Mapping[str, object], collected: CollectedReports, **more: object
    ) -> None:
        """Rank 0: everything but the tensor files of a plan, with `more` in the manifest."""
        manifest = build_manifest(self.checkpoint, plan, entries, left_out=self.left_out[plan.target])
        manifest |= {"request": self._request_of(plan), "fingerprint": self._fingerprint(), **more}
        manifest["run"] = run_statistics(collected.reports)
        numbers, table = self.job.numbered(plan), self._scales.table
        report = quantization_report(plan, numbers, collected.qualities, table)
        write_documents(folder, plan, manifest, quantization=report, shown_as=self.options.output / plan.folder)

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        self.group.enter_phase(name)
        begun = time.monotonic()
        yield
        ended = time.monotonic()
        self.report.seconds[name] = ended - begun
        if self.profile.enabled:
            self.profile.add(name, begun, ended)
