"""``dist-export refit``: with processes of its own, or as a rank that torchrun, srun or mpirun started."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Collection
from pathlib import Path

from msgspec import Struct

from dist_export.api import Source
from dist_export.checkpoint.open import Checkpoint
from dist_export.errors import ExportError
from dist_export.launcher import reporter_of
from dist_export.plan.job import ExportJob
from dist_export.refit.apply import DeltaSession
from dist_export.refit.base import Base
from dist_export.refit.blocks import BLOCK_BYTES
from dist_export.refit.delta import Delta, is_delta
from dist_export.refit.engines import check_engines, engine_lines
from dist_export.refit.files import Changes
from dist_export.refit.redo import finish_interrupted
from dist_export.refit.session import RefitSession
from dist_export.runtime import exit_codes, publication
from dist_export.runtime.events import Reporter
from dist_export.runtime.failure import Failure
from dist_export.runtime.group import Group
from dist_export.runtime.launch import run_local
from dist_export.runtime.progress import format_bytes
from dist_export.runtime.run import run_here
from dist_export.runtime.usage import default_host_memory, default_num_threads, num_cores
from dist_export.runtime.world import World, detect_world
from dist_export.session import RunOptions
from dist_export.shared_index import open_together
from dist_export.targets.trtllm.target import NAME as TRTLLM

NOTHING = Path("-")
"""As SOURCE: only finish what was stopped."""
_SCALES = ("scal", "alpha")


def refit_command(options: argparse.Namespace) -> int:
    """Refit, make a delta or apply one. Returns the exit code."""
    reporter = reporter_of(options)
    try:
        world = detect_world(os.environ)
        if world.world_size == 1:
            _check(options, reporter, world)
    except ExportError as error:
        return _failed(reporter, error)
    if world.world_size > 1:
        return run_here(world, lambda group: _launched(options, reporter, group), tell=reporter.failure)
    return _locally(options, reporter)


def _check(options: argparse.Namespace, reporter: Reporter, world: World) -> None:
    """Raise `ExportError` for options that do not go together, and for a progress file that cannot be written."""
    reporter.check()
    if world.world_size > 1 and options.num_processes:
        raise ExportError("--num-processes: the launcher has started the processes")
    if options.all_names and options.delta_dir is None:
        raise ExportError("--all-names: is for --delta-dir DIR")
    if options.source == NOTHING or is_delta(options.source):
        names = ("iteration", "base", "calibration", "index_cache", "delta_dir")
        given = [f"--{name.replace('_', '-')}" for name in names if getattr(options, name) is not None]
        if given:
            raise ExportError(f"{', '.join(given)}: is for a checkpoint, which {options.source} is not")
    if options.delta_dir is not None:
        publication.check_no_refit(options.output.absolute())
    if options.engines is not None:
        check_engines(options.engines)


def _failed(reporter: Reporter, error: ExportError) -> int:
    failure = Failure.of(-1, error)
    reporter.failure(failure)
    return failure.exit_code


def _locally(options: argparse.Namespace, reporter: Reporter) -> int:
    """Plan once here, then fork processes that share the plan."""
    code = run_local(1, lambda group: _finish_interrupted(options, group), tell=reporter.failure)
    if code or options.source == NOTHING:
        return code
    try:
        base = Base.read(options.output.absolute())
        work = _Delta(options, base) if is_delta(options.source) else _Checkpoint.opened(options, base, None)
        if isinstance(work, _Checkpoint):
            work.job.validate()
    except ExportError as error:
        return _failed(reporter, error)
    num_files = sum(len(each.tensor_files) for each in base.folders)
    num_processes = options.num_processes or max(min(num_files, num_cores()), 1)
    return run_local(num_processes, lambda group: work.run(group, reporter, num_processes), tell=reporter.failure)


def _launched(options: argparse.Namespace, reporter: Reporter, group: Group) -> int:
    """This process is one rank of a job that a launcher started."""
    if group.rank == 0:
        _check(options, reporter, group.world)
    group.barrier("options checked")  # or each rank would refuse them in its own words
    code = _finish_interrupted(options, group)
    if code or options.source == NOTHING:
        return code
    base = Base.read(options.output.absolute())
    if is_delta(options.source):
        return _Delta(options, base).run(group, reporter, group.world.local_world_size)
    return _Checkpoint.opened(options, base, group).run(group, reporter, group.world.local_world_size)


def _finish_interrupted(options: argparse.Namespace, group: Group) -> int:
    finished = finish_interrupted(options.output.absolute(), group)
    if not finished and options.source == NOTHING:
        if not options.output.is_dir():
            raise ExportError(f"{options.output}: no such folder")
        publication.check_no_refit(options.output.absolute())  # of a folder in it, or that it lies in
    if group.rank == 0 and finished:
        print(f"finished the refit of {options.output} that was stopped while it was applied", flush=True)
    elif group.rank == 0 and options.source == NOTHING:
        print(f"{options.output}: no refit was stopped there: nothing to do", flush=True)
    return exit_codes.OK


class _Checkpoint(Struct, frozen=True):
    """A refit to a checkpoint, or a delta of one, as a command line asks for it."""

    options: argparse.Namespace
    base: Base
    source: Source
    checkpoint: Checkpoint
    job: ExportJob

    @classmethod
    def opened(cls, options: argparse.Namespace, base: Base, group: Group | None) -> _Checkpoint:
        """Open the checkpoint, with all ranks of a launched `group`, and plan it as the base was planned."""
        source = base.source(
            options.source,
            iteration=options.iteration,
            base=options.base,
            calibration=options.calibration,
            index_cache=options.index_cache,
            code_allowed=options.allow_mapping_code,
        )
        checkpoint = None if group is None else open_together(source, group)
        model, job = base.plan(source, checkpoint)
        return cls(options, base, source, model.checkpoint, job)

    def run(self, group: Group, reporter: Reporter, num_processes: int) -> int:
        """One rank's part; `num_processes` are on this node."""
        options, base = self.options, self.base
        run = RunOptions(
            output=(options.delta_dir or options.output).absolute(),
            overwrite=options.delta_dir is None,
            # A third is for what the new bytes are compared with.
            host_memory=(options.host_memory or default_host_memory(num_processes)) * 2 // 3,
            num_threads=options.num_threads or default_num_threads(num_processes),
            sha256=base.has_sha256,
            device=options.device,
        )
        with reporter.watch(group, output=str(run.output)):
            if not reporter.json_lines:
                group.show_progress("refitting")
            session = RefitSession(
                self.checkpoint,
                self.job,
                run,
                group,
                base.new_request(self.source),
                base=base,
                all_names=options.all_names,
            )
            session.run()
            if group.rank == 0:
                print(self._closing_text(session), flush=True)
        return exit_codes.OK

    def _closing_text(self, session: RefitSession) -> str:
        sizes = [summary.num_data_bytes for summary in self.job.summaries()]
        shards = {number: self.job.shard(number) for number in session.changes.tensors}
        names = {shards[n].tensors[i].name for n, changed in session.changes.tensors.items() for i in changed}
        num_tensors = sum(len(shard.tensors) for plan in self.job.plans for shard in plan.each_shard())
        what = f"{self.options.output}: iteration {self.base.iterations} to {self.checkpoint.iteration}"
        lines = [f"made a delta of {what}" if session.makes_delta else f"refitted {what}"]
        lines.append(_changed_line(session.changes, num_tensors, sum(sizes), session.makes_delta))
        if session.makes_delta:
            return "\n".join([*lines, f"next: dist-export refit {self.options.delta_dir} {self.options.output}"])
        return "\n".join([*lines, *_engines(self.options, self.base, names)])


class _Delta(Struct, frozen=True):
    """A delta that is to be applied."""

    options: argparse.Namespace
    base: Base

    def run(self, group: Group, reporter: Reporter, _num_processes: int) -> int:
        """One rank's part."""
        options = self.options
        with reporter.watch(group, output=str(self.base.output)):
            if not reporter.json_lines:
                group.show_progress("applying")
            session = DeltaSession(Delta.read(options.source.absolute()), self.base, group)
            session.run()
            if group.rank == 0:
                print(self._closing_text(session), flush=True)
        return exit_codes.OK

    def _closing_text(self, session: DeltaSession) -> str:
        if session.already_done:
            return f"{self.options.output} holds what {self.options.source} leads to already: nothing to do"
        iterations = f"iteration {self.base.iterations} to {session.delta.folders[0].new.get('iteration')}"
        lines = [f"applied {self.options.source} to {self.options.output}: {iterations}"]
        lines.append(_changed_line(session.changes, session.num_tensors, session.num_bytes, False))
        return "\n".join([*lines, *_engines(self.options, self.base, session.changed_names)])


def _changed_line(changes: Changes, num_tensors: int, num_bytes: int, is_delta: bool) -> str:
    done = "differ" if is_delta else "written"
    return (
        f"  {changes.num_tensors} of {num_tensors} tensors changed; {format_bytes(changes.num_bytes)} of "
        f"{format_bytes(num_bytes)} {done} ({changes.num_blocks} blocks of up to {BLOCK_BYTES >> 10} KiB)"
    )


def _engines(options: argparse.Namespace, base: Base, changed: Collection[str]) -> list[str]:
    """What to do with the engines of a refitted export."""
    lines: list[str] = []
    for each in base.folders:
        if each.manifest["request"].get("target") == TRTLLM:
            config = json.loads((each.path / publication.CONFIG).read_text())
            scales = any(part in name for name in changed for part in _SCALES)
            lines += engine_lines(config, each.path, options.engines, scales_changed=scales)
    return lines
