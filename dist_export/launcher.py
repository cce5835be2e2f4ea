"""Starts an export: on this machine with processes of its own, or as a rank that a launcher started."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

from dist_export import report
from dist_export.checkpoint.open import Checkpoint
from dist_export.cli import add_export_arguments, make_plan
from dist_export.plan.export import ExportPlan, validate
from dist_export.runtime import publication
from dist_export.runtime.group import Group
from dist_export.runtime.launch import run_local
from dist_export.runtime.run import run_here
from dist_export.runtime.world import detect_world
from dist_export.session import ExportSession, RunOptions


def run_options(options: argparse.Namespace) -> RunOptions:
    """How to run, from a command line."""
    return RunOptions(
        output=options.output.absolute(),
        overwrite=options.overwrite,
        host_memory=options.host_memory,
        num_threads=options.num_threads,
        device=options.device,
    )


def export_locally(options: argparse.Namespace) -> int:
    """``dist-export export``: plan once here, then fork processes that share the plan. Returns the exit code."""
    run = run_options(options)
    publication.check_output(run.output, overwrite=run.overwrite)
    model, plan = make_plan(options)
    validate(plan)
    num_processes = options.num_processes or max(min(plan.num_files, os.cpu_count() or 1), 1)

    def rank_main(group: Group) -> int:
        return export_rank(model.checkpoint, plan, run, group)

    return run_local(num_processes, rank_main)


def main(arguments: Sequence[str] | None = None) -> int:
    """``launch/export.py``: this process is one rank of a job that torchrun, srun or mpirun started."""
    parser = argparse.ArgumentParser(
        prog="export.py", description="Export a Megatron checkpoint as one rank of a distributed job."
    )
    add_export_arguments(parser, launched=True)
    options = parser.parse_args(arguments)

    def rank_main(group: Group) -> int:
        model, plan = make_plan(options)
        return export_rank(model.checkpoint, plan, run_options(options), group)

    return run_here(detect_world(os.environ), rank_main)


def export_rank(checkpoint: Checkpoint, plan: ExportPlan, run: RunOptions, group: Group) -> int:
    """One rank's export; rank 0 shows progress and prints the closing table."""
    group.show_progress("exporting")
    reports = ExportSession(checkpoint, plan, run, group).run()
    if group.rank == 0:
        print(report.closing_text(plan, run.output, reports), flush=True)
    return 0
