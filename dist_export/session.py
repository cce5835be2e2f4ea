"""One process's part of a distributed export, from plan to publication.

Every rank runs `ExportSession.run` with the same plan. Rank 0 also stages, gathers and publishes. A rank
that fails raises; the group makes every other rank stop within seconds, and nothing is published.
"""

from __future__ import annotations

import hashlib
import json
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from dist_export import __version__
from dist_export.checkpoint.open import Checkpoint
from dist_export.convert.execute import Budget, Converter, Executor
from dist_export.convert.journal import FOLDER as JOURNALS
from dist_export.convert.journal import (
    Done,
    Journal,
    confirmed,
    read_fingerprint,
    read_journals,
    remove_journals,
    write_fingerprint,
)
from dist_export.convert.ledger import Run, TensorKey, merged
from dist_export.convert.numpy_arithmetic import MOST_BYTES, NumpyArithmetic
from dist_export.convert.outputs import OutputFile
from dist_export.convert.sources import SourceFiles
from dist_export.errors import ExportError
from dist_export.manifest import CollectedReports, RankReport, build_manifest, file_entries, run_statistics
from dist_export.plan.job import ExportJob
from dist_export.plan.placement import Placement, fills_of, make_placement, work_of
from dist_export.plan.work import Fill, Use, WorkItem, collect_uses
from dist_export.runtime import publication
from dist_export.runtime.failure import PeerFailedError
from dist_export.runtime.group import Group
from dist_export.runtime.usage import Usage, physical_memory
from dist_export.targets.huggingface.reference import without_code


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """How an export runs, apart from what it makes."""

    output: Path
    overwrite: bool = False
    resume: bool = False
    """Go on where an earlier run of the same export was stopped."""
    host_memory: int = 1 << 30
    """Bytes for buffers, per process."""
    num_threads: int = 2
    sha256: bool = False
    """Put SHA-256 of every tensor file into the manifest: reads each file back."""
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
    attempt: str
    """Names this run's journals."""
    resumed: bool
    """Whether the staging folder holds an earlier run's work."""

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
    source_fingerprint: str = ""
    """Of the checkpoint's files, on rank 0 before the work began."""
    staging: publication.Staging | None = None
    """On rank 0, from the moment it has the lease."""

    def __post_init__(self) -> None:
        self.report = RankReport(self.group.rank, memory_at_start=Usage.now().memory)

    def run(self) -> list[RankReport]:
        """Export and publish. Returns every rank's report on rank 0, an empty list elsewhere. All ranks call it."""
        group, started = self.group, Usage.now()
        group.check()
        try:
            agreement = self._agree()
            placement = agreement.placement()
            self._compare_digests(agreement, placement)
            executor = self._transfer(agreement, placement)
            self._fill_report(executor, started)
            collected = CollectedReports()
            group.gather_each("reports", self.report.encode(), collected.add)
            if group.rank == 0:
                self._finish(collected)
        except BaseException as error:
            # Not a signal: that may be a launcher's answer to the death of another rank, which the group finds out.
            if isinstance(error, Exception) and not isinstance(error, PeerFailedError):
                group.fail(error)  # before the files vanish, or the others would report that instead
            if self.staging is not None:
                self.staging.abandon(keep=is_resumable(error))
            raise
        group.barrier("published")
        return collected.reports

    def _agree(self) -> Agreement:
        """Rank 0 validates the plan and stages the output; every rank then knows its part of the same plan."""
        hosts = self.group.gather("hosts", socket.gethostname().encode())
        message = None
        if hosts is not None:
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
            )
            message = json.dumps(asdict(agreement)).encode()
        return Agreement(**json.loads(self.group.broadcast("agreement", message)))

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
        self.source_fingerprint = self.checkpoint.fingerprint()
        fingerprint = {"job": self.job.digest(), "source": self.source_fingerprint, "version": __version__}
        there = read_fingerprint(staging.folder) if self.options.resume else None
        if there is not None and there != fingerprint:
            changed = ", ".join(key for key, value in fingerprint.items() if there.get(key) != value)
            raise ExportError(
                f"{self.options.output}: cannot resume, since what is exported has changed ({changed}); "
                "start again without --resume"
            )
        if there is None:
            staging.clear()
            write_fingerprint(staging.folder, fingerprint)
        for plan in self.job.plans:
            (staging.folder / plan.folder).mkdir(exist_ok=True)
        return there is not None

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
        items.sort(key=lambda item: index.first_place(item.slab.name, item.slab.box(item.shape)))
        return items, fills_of(rank, placement, fills)

    def _transfer(self, agreement: Agreement, placement: Placement) -> Executor:
        """Do this process's share of the work. What it owns is on disk when it returns."""
        staging, rank = publication.staging_folder(self.options.output), self.group.rank
        items, fills = self._work(placement)
        owned = placement.owned_by(rank)
        found = self._create_files(staging, owned, resumed=agreement.resumed)
        done = self._share_done(found) if agreement.resumed else {}
        self.group.barrier("files created")
        needed = {use.output.file for item in items for use in item.uses} | {f.output.file for f in fills} | set(owned)
        outputs = {number: OutputFile(staging / self.job.path(number)) for number in sorted(needed)}
        journal = Journal(staging / JOURNALS / f"{rank:05d}-{agreement.attempt}.txt")
        executor = self._executor(outputs, items, fills)
        executor.done, executor.journal = Done(done), journal
        for key, runs in found.items():
            executor.ledger.take_over(key, runs)
        try:
            with self._phase("transfer"):
                executor.run(items, fills)
            with self._phase("sync"):
                self.group.barrier("files written")
                for number in owned:
                    outputs[number].finish()
                    if self.options.sha256:
                        self.report.sha256[str(number)] = self._digest(staging / self.job.path(number))
        finally:
            journal.close()
            executor.sources.close()
            for output in outputs.values():
                output.close()
        self.report.bytes_read = executor.sources.num_bytes_read
        self.report.bytes_written = sum(output.num_bytes_written for output in outputs.values())
        return executor

    def _digest(self, path: Path) -> str:
        """SHA-256 of a finished file, hexadecimal."""
        state = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                state.update(block)
                self.group.check()
        return state.hexdigest()

    def _create_files(self, staging: Path, owned: Sequence[int], *, resumed: bool) -> dict[TensorKey, list[Run]]:
        """Create the files this process owns; those of an earlier run stay. Returns their confirmed runs."""
        noted = read_journals(staging) if resumed else {}
        found: dict[TensorKey, list[Run]] = {}
        for number in owned:
            shard, path = self.job.shard(number), staging / self.job.path(number)
            header = shard.header
            if not path.exists():
                OutputFile.create(path, header, shard.num_data_bytes)
                continue
            OutputFile.restore(path, header, shard.num_data_bytes)
            for index, tensor in enumerate(shard.tensors):
                runs = noted.get((number, index), ())
                for run in confirmed(path, len(header) + tensor.offset, tensor.num_bytes, runs):
                    found.setdefault((number, index), []).append(run)
                    self.group.progress.add(bytes_written=run[1])  # reading back takes a while: it is no standstill
                    self.group.check()
        return found

    def _share_done(self, found: Mapping[TensorKey, Sequence[Run]]) -> dict[TensorKey, list[Run]]:
        """Every rank learns what all files hold already, since ranks of a node share work."""
        mine = json.dumps([[*key, merged(runs)] for key, runs in found.items() if runs]).encode()
        gathered = self.group.gather("found", mine)
        whole = [entry for each in gathered for entry in json.loads(each)] if gathered is not None else None
        told = self.group.broadcast("done", None if whole is None else json.dumps(whole).encode())
        return {(file, index): [(run[0], run[1], run[2]) for run in runs] for file, index, runs in json.loads(told)}

    def _executor(
        self, outputs: Mapping[int, OutputFile], items: Sequence[WorkItem], fills: Sequence[Fill]
    ) -> Executor:
        self.report.bytes_needed = sum(item.num_bytes_needed for item in items)
        self.group.progress.add(total=sum(item.num_bytes_written for item in items))
        self.group.progress.add(total=sum(fill.num_bytes_written for fill in fills))
        computed = [use for item in items for use in item.uses if not use.output.planned.moves_only]
        budget = Budget.within(
            self.options.host_memory, num_threads=self.options.num_threads, value_ops=bool(computed)
        )
        index = self.checkpoint.index
        executor = Executor(
            SourceFiles(index, give_back=index.num_weight_bytes > physical_memory() // 4),
            outputs,
            budget=budget,
            observer=_Watcher(self.group),
        )
        executor.converter = self._converter(computed) if computed else None
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

    def _finish(self, collected: CollectedReports) -> None:
        """Rank 0: prove that every byte was written, then write manifests and configurations and publish."""
        assert self.staging is not None
        self.group.enter_phase("publish")
        files = [file_entries(plan, self.job.numbered(plan), collected) for plan in self.job.plans]
        if self.checkpoint.fingerprint() != self.source_fingerprint:
            raise ExportError(f"{self.checkpoint.index.folder}: files changed during the export; start it again")
        folder = self.staging.finish()
        remove_journals(folder)
        for plan, entries in zip(self.job.plans, files, strict=True):
            manifest = build_manifest(self.checkpoint, plan, entries, left_out=self.left_out[plan.target])
            manifest["request"] = {**self.request, "target": plan.target, "options": plan.options}
            manifest["run"] = {"processes": run_statistics(collected.reports)}
            for name, source in plan.copies.items():
                publication.write_file(folder / plan.folder / name, without_code(name, source.read_bytes()))
            for name, document in {publication.MANIFEST: manifest, **plan.documents()}.items():
                text = json.dumps(document, indent=2) + "\n"
                publication.write_file(folder / plan.folder / name, text.encode())
            publication.sync_folder(folder / plan.folder)
        self.staging.publish()

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        self.group.enter_phase(name)
        begun = time.monotonic()
        yield
        self.report.seconds[name] = time.monotonic() - begun


def is_resumable(error: BaseException) -> bool:
    """Whether what was written is worth keeping: the run was stopped, rather than its input being at fault."""
    if isinstance(error, PeerFailedError):
        return error.failure.kind != "input"
    return not isinstance(error, ExportError)


@dataclass(frozen=True, slots=True)
class _Watcher:
    """Counts progress, and stops the work when another rank has failed."""

    group: Group

    def progress(self, num_bytes_read: int, num_bytes_written: int) -> None:
        self.group.progress.add(bytes_read=num_bytes_read, bytes_written=num_bytes_written)
        self.group.check()


