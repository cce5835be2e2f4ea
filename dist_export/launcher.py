"""Starts an export: on this machine with processes of its own, or as a rank that a launcher started."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

from dist_export import report
from dist_export.cli import add_export_arguments, make_job, request_of
from dist_export.runtime import publication
from dist_export.runtime.group import Group
from dist_export.runtime.launch import run_local
from dist_export.runtime.run import run_here
from dist_export.runtime.world import detect_world
from dist_export.session import ExportSession, RunOptions
from dist_export.shared_index import open_shared


def run_options(options: argparse.Namespace) -> RunOptions:
    """How to run, from a command line."""
    return RunOptions(
        output=options.output.absolute(),
        overwrite=options.overwrite,
        resume=options.resume,
        host_memory=options.host_memory,
        num_threads=options.num_threads,
        device=options.device,
    )


def export_locally(options: argparse.Namespace) -> int:
    """``dist-export export``: plan once here, then fork processes that share the plan. Returns the exit code."""
    run = run_options(options)
    publication.check_output(run.output, overwrite=run.overwrite)
    model, job = make_job(options)
    job.validate()
    num_processes = options.num_processes or max(min(job.num_files, os.cpu_count() or 1), 1)

    def rank_main(group: Group) -> int:
        return export_rank(ExportSession(model.checkpoint, job, run, group, request_of(options)))

    return run_local(num_processes, rank_main)


def main(arguments: Sequence[str] | None = None) -> int:
    """``launch/export.py``: this process is one rank of a job that torchrun, srun or mpirun started."""
    parser = argparse.ArgumentParser(
        prog="export.py", description="Export a Megatron checkpoint as one rank of a distributed job."
    )
    add_export_arguments(parser, launched=True)
    options = parser.parse_args(arguments)

    def rank_main(group: Group) -> int:
        checkpoint = open_shared(options.checkpoint, group, iteration=options.iteration)
        model, job = make_job(options, checkpoint)
        return export_rank(ExportSession(model.checkpoint, job, run_options(options), group, request_of(options)))

    return run_here(detect_world(os.environ), rank_main)


def export_rank(session: ExportSession) -> int:
    """One rank's export; rank 0 shows progress and prints the closing table."""
    session.group.show_progress("exporting")
    reports = session.run()
    if session.group.rank == 0:
        print(report.closing_text(session.job, session.options.output, reports), flush=True)
    return 0
