"""``dist-export verify``: every export of an output folder, level by level, on processes of its own."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from msgspec import to_builtins

from dist_export.checkpoint.archive import is_tar, open_tar
from dist_export.errors import ExportError
from dist_export.runtime import exit_codes
from dist_export.runtime.group import Group
from dist_export.runtime.launch import run_local
from dist_export.runtime.usage import num_cores
from dist_export.verify.files import read_manifest
from dist_export.verify.findings import LEVELS
from dist_export.verify.run import VerifyOptions, find_exports, source_from_manifest, verify_export


def verify_command(options: argparse.Namespace) -> int:
    """Verify what a command line names; the exit code says whether all of it is right."""
    chosen = VerifyOptions(
        levels=tuple(options.levels or LEVELS), sha256=options.sha256, num_threads=options.num_threads,
        code_allowed=options.allow_mapping_code,
    )
    for path in filter(None, (options.checkpoint, options.base)):
        if is_tar(path):
            open_tar(path)  # a compressed archive is decompressed here, once for all processes
    codes = [_verify(options, folder.absolute(), chosen) for folder in find_exports(options.output)]
    if options.logits and not any(codes):
        codes += [_verify_logits(options, folder.absolute()) for folder in find_exports(options.output)]
    return max(codes)


def _verify(options: argparse.Namespace, folder: Path, chosen: VerifyOptions) -> int:
    def rank_main(group: Group) -> int:
        group.show_progress("verifying")
        report = verify_export(options.checkpoint, folder, options=chosen, group=group, base=options.base)
        if group.rank == 0:
            print(report.to_json() if options.json else report, flush=True)
        return exit_codes.OK if report.ok else exit_codes.NOT_VERIFIED

    return run_local(options.num_processes or num_cores(), rank_main)


def _verify_logits(options: argparse.Namespace, folder: Path) -> int:
    from dist_export.verify.logits import read_tokens, verify_logits

    code_allowed = options.allow_mapping_code
    source = source_from_manifest(
        options.checkpoint, read_manifest(folder), base=options.base, code_allowed=code_allowed
    )
    if source.mapping is not None:
        raise ExportError("--logits: not for exports made with --mapping; the reference knows only the families")
    if source.base is not None or source.master_weights:
        raise ExportError("--logits: not for merged adapters (--base) and optimizer weights (--master-weights)")
    report = verify_logits(
        options.checkpoint,
        folder,
        tokens=read_tokens(options.tokens) if options.tokens else None,
        iteration=source.iteration,
        overrides=source.overrides,
    )
    print(json.dumps(to_builtins(report)) if options.json else report, flush=True)
    return exit_codes.OK if report.agrees else exit_codes.NOT_VERIFIED
