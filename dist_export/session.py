"""One process's part of a distributed export, from plan to publication.

Every rank runs `ExportSession.run` with the same plan. Rank 0 also stages, gathers and publishes. A rank
that fails raises; the group makes every other rank stop within seconds, and nothing is published.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from dist_export.checkpoint.open import Checkpoint
from dist_export.convert.execute import Budget, Converter, Executor
from dist_export.convert.numpy_arithmetic import MOST_BYTES, NumpyArithmetic
from dist_export.convert.outputs import OutputFile
from dist_export.convert.sources import SourceFiles
from dist_export.errors import ExportError
from dist_export.manifest import RankReport, build_manifest, file_entries, merge_runs, run_statistics
from dist_export.plan.job import ExportJob
from dist_export.plan.placement import Placement, fills_of, make_placement, work_of
from dist_export.plan.work import Fill, Use, WorkItem, collect_uses
from dist_export.runtime import publication
from dist_export.runtime.group import Group
from dist_export.runtime.usage import Usage


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """How an export runs, apart from what it makes."""

    output: Path
    overwrite: bool = False
    host_memory: int = 1 << 30
    """Bytes for buffers, per process."""
    num_threads: int = 2
    device: str = "auto"
    """For value operations: ``auto`` (a GPU where there is one), ``cpu`` or a torch device."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """What rank 0 tells all ranks before the work: who runs where, and what every file must be."""

    hosts: list[str]
    costs: list[int]
    """Bytes of every file."""
    digests: list[str]
    """Plan digest of every file."""

    def placement(self) -> Placement:
        """Who makes which file."""
        return make_placement([self.hosts.index(host) for host in self.hosts], self.costs)


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

    def __post_init__(self) -> None:
        self.report = RankReport(self.group.rank, memory_at_start=Usage.now().memory)

    def run(self) -> list[RankReport]:
        """Export and publish. Returns every rank's report on rank 0, an empty list elsewhere. All ranks call it."""
        group, started = self.group, Usage.now()
        group.check()
        placement = self._agree()
        staging = publication.staging_folder(self.options.output)
        try:
            items, fills = self._work(placement)
            with self._phase("transfer"):
                executor = self._transfer(staging, items, fills, placement)
            self._fill_report(executor, started)
            reports = [RankReport.decode(data) for data in group.gather("reports", self.report.encode()) or ()]
            if group.rank == 0:
                self._finish(staging, reports)
        except BaseException:
            if group.rank == 0:
                publication.discard_staging(self.options.output)
            raise
        group.barrier("published")
        return reports

    def _agree(self) -> Placement:
        """Rank 0 validates the plan and stages the output; every rank then knows its part of the same plan."""
        hosts = self.group.gather("hosts", socket.gethostname().encode())
        message = None
        if hosts is not None:
            publication.check_output(self.options.output, overwrite=self.options.overwrite)
            self.left_out = self.job.validate()
            shards = self.job.shards().values()
            agreement = Agreement(
                [host.decode() for host in hosts],
                [shard.num_data_bytes for shard in shards],
                [shard.digest() for shard in shards],
            )
            folders = [plan.folder for plan in self.job.plans]
            publication.create_staging(self.options.output, folders)
            message = json.dumps(asdict(agreement)).encode()
        agreement = Agreement(**json.loads(self.group.broadcast("agreement", message)))
        placement = agreement.placement()
        self._compare_digests(agreement, placement)
        return placement

    def _compare_digests(self, agreement: Agreement, placement: Placement) -> None:
        for number in placement.files_near(self.group.rank):
            own = self.job.shard(number).digest()
            if own != agreement.digests[number]:
                raise ExportError(
                    f"rank {self.group.rank} plans {self.job.path(number)} differently from rank 0 (digests {own[:12]} "
                    f"and {agreement.digests[number][:12]}): the processes see different checkpoints or options"
                )

    def _work(self, placement: Placement) -> tuple[list[WorkItem], list[Fill]]:
        """This process's share: only files made on its node are planned."""
        rank, index = self.group.rank, self.checkpoint.index
        shards = {number: self.job.shard(number) for number in placement.files_near(rank)}
        slabs, fills = collect_uses(shards, self.job.catalog.tensors)
        items = work_of(rank, placement, slabs)
        items.sort(key=lambda item: [(c.file, c.offset) for c in index.chunks(item.slab.name)[:1]])
        return items, fills_of(rank, placement, fills)

    def _transfer(
        self, staging: Path, items: list[WorkItem], fills: list[Fill], placement: Placement
    ) -> Executor:
        owned = placement.owned_by(self.group.rank)
        for number in owned:
            shard = self.job.shard(number)
            OutputFile.create(staging / self.job.path(number), shard.header, shard.num_data_bytes)
        self.group.barrier("files created")
        needed = {use.output.file for item in items for use in item.uses} | {f.output.file for f in fills} | set(owned)
        outputs = {number: OutputFile(staging / self.job.path(number)) for number in sorted(needed)}
        sources = SourceFiles(self.checkpoint.index)
        self.report.bytes_needed = sum(item.num_bytes_needed for item in items)
        self.group.progress.add(total=sum(item.num_bytes_written for item in items))
        self.group.progress.add(total=sum(fill.num_bytes_written for fill in fills))
        computed = [use for item in items for use in item.uses if not use.output.planned.moves_only]
        budget = Budget.within(
            self.options.host_memory, num_threads=self.options.num_threads, value_ops=bool(computed)
        )
        executor = Executor(sources, outputs, budget=budget, observer=_Watcher(self.group))
        executor.converter = self._converter(computed) if computed else None
        try:
            executor.run(items, fills)
            self.group.barrier("files written")
            for number in owned:
                outputs[number].finish()
        finally:
            sources.close()
            for output in outputs.values():
                output.close()
        self.report.bytes_read = sources.num_bytes_read
        self.report.bytes_written = sum(output.num_bytes_written for output in outputs.values())
        return executor

    def _converter(self, uses: Sequence[Use]) -> Converter:
        """What does the arithmetic of `uses`. Torch is imported here, and only when it pays."""
        small = sum(use.num_bytes for use in uses) <= MOST_BYTES
        device = self.options.device
        if small and device in ("auto", "cpu") and all(NumpyArithmetic.supports(use.output.planned) for use in uses):
            return NumpyArithmetic()
        from dist_export.convert.torch_arithmetic import TorchArithmetic, default_device

        return TorchArithmetic(default_device(self.group.world.local_rank) if device == "auto" else device)

    def _fill_report(self, executor: Executor, started: Usage) -> None:
        now = Usage.now()
        self.report.bytes_read_by_calls = now.read_calls - started.read_calls
        self.report.bytes_read_from_disk = now.disk_reads - started.disk_reads
        self.report.peak_memory = now.peak_memory
        self.report.set_runs(executor.ledger.runs())

    def _finish(self, staging: Path, reports: list[RankReport]) -> None:
        """Rank 0: prove that every byte was written, then write manifests and configurations and publish."""
        runs = merge_runs(reports)
        for plan in self.job.plans:
            files = file_entries(plan, self.job.numbered(plan), runs)
            manifest = build_manifest(self.checkpoint, plan, files, left_out=self.left_out[plan.target])
            manifest["request"] = {**self.request, "target": plan.target, "options": plan.options}
            manifest["run"] = {"processes": run_statistics(reports)}
            documents = {publication.MANIFEST: manifest, **plan.documents()}
            for name, document in documents.items():
                publication.write_file(staging / plan.folder / name, json.dumps(document, indent=2) + "\n")
            publication.sync_folder(staging / plan.folder)
        publication.publish(self.options.output)

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        begun = time.monotonic()
        yield
        self.report.seconds[name] = time.monotonic() - begun


@dataclass(frozen=True, slots=True)
class _Watcher:
    """Counts progress, and stops the work when another rank has failed."""

    group: Group

    def progress(self, num_bytes_read: int, num_bytes_written: int) -> None:
        self.group.progress.add(bytes_read=num_bytes_read, bytes_written=num_bytes_written)
        self.group.check()


