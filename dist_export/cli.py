"""The command line: arguments to values, values to the library, results to text."""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from dist_export import __version__
from dist_export.arguments import (
    add_engine_arguments,
    add_export_arguments,
    add_source_arguments,
    add_target_arguments,
    add_verify_arguments,
    make_job,
    source_of,
)
from dist_export.errors import ExportError
from dist_export.refit.arguments import add_refit_arguments
from dist_export.run_arguments import add_calibrate_arguments, add_evaluate_arguments, add_generate_arguments
from dist_export.runtime import exit_codes

EPILOG = """examples:
  dist-export inspect /checkpoints/run1
  dist-export plan    /checkpoints/run1 --tp 4 --pp 2
  dist-export export  /checkpoints/run1 /exports/run1 --tp 4 --pp 2
  torchrun --nproc-per-node 8 launch/export.py /checkpoints/run1 /exports/run1 --tp 4 --pp 2
"""

GARBAGE_AFTER = 100_000
"""Objects made between two searches for cycles: plans are many small objects, and have none."""
INSTALL_TORCH = "run: pip install 'dist-export[torch]'"


class _WideParser(argparse.ArgumentParser):
    """A command's parser: help that keeps long options and their meaning on one line, whatever the terminal."""

    def __init__(self, **options: Any) -> None:
        options.setdefault("formatter_class", partial(argparse.HelpFormatter, max_help_position=32, width=98))
        super().__init__(**options)


def build_parser(program: str = "dist-export") -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        prog=program,
        description="Turn a Megatron checkpoint into something that serves.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"dist-export {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_WideParser)
    inspect = commands.add_parser("inspect", help="what is in a checkpoint: model, layout, sizes, provenance")
    add_source_arguments(inspect)
    inspect.add_argument("--json", action="store_true", help="print everything as JSON")
    plan = commands.add_parser("plan", help="dry run: what every rank would read and write, and every problem")
    add_source_arguments(plan)
    add_target_arguments(plan)
    plan.add_argument("--json", action="store_true", help="print the whole plan as JSON")
    page = commands.add_parser("report", help="write the page export_report.html of an export anew")
    page.add_argument("output", type=Path, metavar="OUTPUT", help="a published export")
    page.add_argument("--verification", type=Path, metavar="FILE", help="what `dist-export verify --json` printed")
    page.add_argument("--html", type=Path, metavar="FILE", help="where to write it, default OUTPUT/export_report.html")
    families = commands.add_parser("families", help="the model families, and what each can be exported to")
    families.add_argument("--markdown", action="store_true", help="as the table of the README")
    add_export_arguments(commands.add_parser("export", help="export on this machine, starting its own processes"))
    add_engine_arguments(commands.add_parser("engine", help="build TensorRT-LLM engines from an existing export"))
    add_refit_arguments(commands.add_parser("refit", help="bring an export to a newer iteration, writing what changed"))
    add_verify_arguments(commands.add_parser("verify", help="prove that an export is right, without a GPU or TensorRT"))
    add_calibrate_arguments(commands.add_parser("calibrate", help="find the scales of a quantised export from texts"))
    add_generate_arguments(commands.add_parser("generate", help="what an export continues a prompt with"))
    add_evaluate_arguments(commands.add_parser("evaluate", help="perplexity and ROUGE of an export, with thresholds"))
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code (`dist_export.runtime.exit_codes`)."""
    options = build_parser().parse_args(arguments)
    commands = {"inspect": _inspect, "plan": _plan, "export": _export, "verify": _verify, "report": _report}
    commands |= {"families": _families, "calibrate": _calibrate, "generate": _generate, "evaluate": _evaluate}
    commands |= {"engine": _engine, "refit": _refit}
    try:
        return commands[options.command](options)
    except ExportError as error:
        print(f"dist-export: error: {error}", file=sys.stderr)
        return exit_codes.BAD_INPUT
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        print(f"dist-export: error: {options.command} needs torch here; {INSTALL_TORCH}", file=sys.stderr)
        return exit_codes.BAD_INPUT
    except BrokenPipeError:  # the reader of our output has gone: nothing is left to say
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return exit_codes.OK


def _inspect(options: argparse.Namespace) -> int:
    from dist_export import api, report

    model = api.open_model(source_of(options))
    print(json.dumps(report.inspection(model), indent=1) if options.json else report.inspection_text(model))
    return exit_codes.OK


def _plan(options: argparse.Namespace) -> int:
    from dist_export import report

    model, job = make_job(options, source_of(options))
    summary = report.plan_summary(model, job, job.validate())
    print(json.dumps(summary, indent=1) if options.json else report.plan_text(summary))
    return exit_codes.OK


def _verify(options: argparse.Namespace) -> int:
    from dist_export.verify.command import verify_command

    return verify_command(options)


def _calibrate(options: argparse.Namespace) -> int:
    from dist_export.calibrate.command import calibrate_command

    return calibrate_command(options)


def _generate(options: argparse.Namespace) -> int:
    from dist_export.generate import generate_command

    return generate_command(options)


def _evaluate(options: argparse.Namespace) -> int:
    from dist_export.evaluate import evaluate_command

    return evaluate_command(options)


def _report(options: argparse.Namespace) -> int:
    from dist_export import export_report

    page = export_report.render_folder(options.output, verification=options.verification)
    place = options.html or options.output / export_report.NAME
    try:
        place.write_text(page)
    except OSError as error:
        raise ExportError(f"{place}: {error.strerror}") from error
    print(place)
    return exit_codes.OK


def _families(options: argparse.Namespace) -> int:
    from dist_export.families import support

    print(support.markdown() if options.markdown else support.text())
    return exit_codes.OK


def _engine(options: argparse.Namespace) -> int:
    from dist_export.engines.command import engine_command

    return engine_command(options)


def _refit(options: argparse.Namespace) -> int:
    from dist_export.refit.command import refit_command

    return refit_command(options)


def _export(options: argparse.Namespace) -> int:
    gc.set_threshold(GARBAGE_AFTER)
    _load_numpy()
    from dist_export.launcher import export_locally

    return export_locally(options)


def _load_numpy() -> None:
    """Import numpy without the threads of its linear algebra, which nothing here uses: they spin beside the work.

    The variable is read when the library is loaded; programs that are started later do not see it.
    """
    name = "OPENBLAS_NUM_THREADS"
    if name in os.environ:
        return
    os.environ[name] = "1"
    try:
        import numpy  # noqa: F401
    finally:
        del os.environ[name]
