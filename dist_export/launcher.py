"""Starts an export: on this machine with processes of its own, or as a rank that a launcher started."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec import Struct

from dist_export import report
from dist_export.arguments import add_export_arguments, make_job, request_of, source_of
from dist_export.errors import ExportError
from dist_export.runtime import publication
from dist_export.runtime.events import Reporter
from dist_export.runtime.failure import Failure
from dist_export.runtime.group import Group
from dist_export.runtime.launch import run_local
from dist_export.runtime.run import run_here
from dist_export.runtime.usage import default_host_memory, default_num_threads, num_cores
from dist_export.runtime.world import detect_world
from dist_export.session import ExportSession, RunOptions
from dist_export.shared_index import open_together

if TYPE_CHECKING:
    from dist_export.engines.availability import Gpu
    from dist_export.engines.build import EngineRequest
    from dist_export.plan.job import ExportJob


def run_options(options: argparse.Namespace, *, num_processes: int = 1) -> RunOptions:
    """How to run, from a command line, with `num_processes` on this node."""
    return RunOptions(
        output=options.output.absolute(),
        overwrite=options.overwrite,
        resume=options.resume,
        host_memory=options.host_memory or default_host_memory(num_processes),
        device_memory=options.device_memory,
        num_threads=options.num_threads or default_num_threads(num_processes),
        local_staging=options.local_staging.absolute() if options.local_staging else None,
        sha256=options.sha256,
        device=options.device,
        profile=_profile_folder(options.profile),
    )


def _profile_folder(path: Path | None) -> Path | None:
    """Make the folder for timelines; any rank may be the first."""
    if path is None:
        return None
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ExportError(f"--profile {path}: {error.strerror}") from error
    return path.absolute()


def export_locally(options: argparse.Namespace) -> int:
    """``dist-export export``: plan once here, then fork processes that share the plan. Returns the exit code."""
    reporter = reporter_of(options)
    try:
        reporter.check()
        if not options.resume:  # else it may be done already, which the run itself finds out
            publication.check_output(options.output.absolute(), overwrite=options.overwrite)
        source = source_of(options)
        model, job = make_job(options, source)
        job.validate()
        engines = Engines.asked(options, job)
    except ExportError as error:
        failure = Failure.of(-1, error)
        reporter.failure(failure)
        return failure.exit_code
    num_processes = options.num_processes or max(min(job.num_files, num_cores()), 1)
    run = run_options(options, num_processes=num_processes)

    def rank_main(group: Group) -> int:
        with reporter.watch(group, output=str(run.output)):
            session = ExportSession(model.checkpoint, job, run, group, request_of(options, source))
            return export_rank(session, reporter, engines)

    return run_local(num_processes, rank_main, tell=reporter.failure)


def main(arguments: Sequence[str] | None = None) -> int:
    """``launch/export.py``: this process is one rank of a job that torchrun, srun or mpirun started."""
    parser = argparse.ArgumentParser(
        prog="export.py", description="Export a Megatron checkpoint as one rank of a distributed job."
    )
    add_export_arguments(parser, launched=True)
    options = parser.parse_args(arguments)

    reporter = reporter_of(options)

    def rank_main(group: Group) -> int:
        if group.rank == 0:
            reporter.check()
        with reporter.watch(group, output=str(options.output.absolute())):
            source = source_of(options)
            model, job = make_job(options, source, open_together(source, group))
            run = run_options(options, num_processes=group.world.local_world_size)
            engines = Engines.asked(options, job)
            session = ExportSession(model.checkpoint, job, run, group, request_of(options, source))
            return export_rank(session, reporter, engines)

    try:
        world = detect_world(os.environ)
    except ExportError as error:
        failure = Failure.of(-1, error)
        reporter.failure(failure)
        return failure.exit_code
    return run_here(world, rank_main, tell=reporter.failure)


def reporter_of(options: argparse.Namespace) -> Reporter:
    """Where a command line wants events and failures."""
    return Reporter(json_lines=options.log_json, progress_file=options.progress_file)


class Engines(Struct, frozen=True):
    """What is to be built once the export is published."""

    request: EngineRequest
    gpus: list[Gpu]

    @classmethod
    def asked(cls, options: argparse.Namespace, job: ExportJob) -> Engines | None:
        """Of ``--build-engine``; None without it. Raises `ExportError` where engines cannot be built."""
        if options.build_engine is None:
            if options.engine_config or options.engine_option:
                raise ExportError("--engine-config and --engine-option are for --build-engine DIR")
            return None
        from dist_export.engines import command

        request = command.request_of(options, options.build_engine)
        return cls(request, command.prepare_job(request, job))


def export_rank(session: ExportSession, reporter: Reporter, engines: Engines | None = None) -> int:
    """One rank's export; rank 0 shows progress and prints the closing table. Then the engines, where asked for."""
    if not reporter.json_lines:
        session.group.show_progress("exporting")
    reports = session.run()
    if session.group.rank == 0 and session.already_done:
        print(f"{session.options.output} holds this export already: nothing to do", flush=True)
    elif session.group.rank == 0:
        print(report.closing_text(session.job, session.options.output, reports), flush=True)
    if engines is not None:
        from dist_export.engines.command import build_after_export

        build_after_export(engines.request, session.job, session.options.output, session.group, engines.gpus)
    return 0


if __name__ == "__main__":
    sys.exit(main())
