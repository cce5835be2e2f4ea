"""``dist-export engine`` and ``--build-engine``: from a command line to engines."""

from __future__ import annotations

import argparse
import json
import os
import re
from pathlib import Path
from typing import Any

from dist_export.engines.availability import Gpu
from dist_export.engines.build import EngineRequest, build_engines, prepare
from dist_export.engines.options import parse_assignments, read_options
from dist_export.errors import ExportError
from dist_export.plan.job import ExportJob
from dist_export.runtime import publication
from dist_export.runtime.group import Group
from dist_export.runtime.run import run_here
from dist_export.runtime.world import detect_world
from dist_export.targets.trtllm.releases import RELEASES
from dist_export.targets.trtllm.target import NAME


def request_of(options: argparse.Namespace, output: Path) -> EngineRequest:
    """What a command line asks for. Raises `ExportError` for options that do not exist."""
    flags = {name.removeprefix("engine:"): value for name, value in vars(options).items() if name.startswith("engine:")}
    given = {**parse_assignments(options.engine_option), **flags}
    return EngineRequest(output.absolute(), read_options(options.engine_config, given), options.overwrite)


def engine_command(options: argparse.Namespace) -> int:
    """``dist-export engine``: alone, or as a rank that torchrun, srun or mpirun started. Returns the exit code."""
    request = request_of(options, options.engines)
    folder = trtllm_folder(options.output)
    manifest = _read(folder / publication.MANIFEST)
    config = _read(folder / publication.CONFIG)
    valid = releases_within(str(manifest.get("target", {}).get("valid in", "")))

    def rank_main(group: Group) -> int:
        gpus = prepare(request, config, valid)
        group.barrier("ready")
        build_engines(folder, request, group, gpus)
        if group.rank == 0:
            print(closing_text(request), flush=True)
        return 0

    return run_here(detect_world(os.environ), rank_main)


def prepare_job(request: EngineRequest, job: ExportJob) -> list[Gpu]:
    """Before an export with ``--build-engine``: whether its engines can be built. Raises `ExportError`."""
    plan = next((plan for plan in job.plans if plan.target == NAME), None)
    if plan is None:
        raise ExportError("--build-engine: engines are built of TensorRT-LLM exports; add --target trtllm")
    return prepare(request, plan.config, releases_within(plan.facts["valid in"]))


def build_after_export(request: EngineRequest, job: ExportJob, output: Path, group: Group, gpus: list[Gpu]) -> None:
    """After an export was published. All ranks call it. A failure says how to go on from the export."""
    plan = next(plan for plan in job.plans if plan.target == NAME)
    hint = f"the export itself is whole: build again with dist-export engine {output} {request.output}"
    build_engines(output / plan.folder, request, group, gpus, hint=hint)
    if group.rank == 0:
        print(closing_text(request), flush=True)


def closing_text(request: EngineRequest) -> str:
    """What is said at the end."""
    if request.options.dry_run:
        return "dry run: every rank's checkpoint was loaded and its network made; no engine was built"
    return f"built engines in {request.output}"


def trtllm_folder(output: Path) -> Path:
    """The TensorRT-LLM part of an export. Raises `ExportError` when there is none."""
    for folder in (output, output / NAME):
        if (folder / "rank0.safetensors").is_file() and (folder / publication.CONFIG).is_file():
            return folder.absolute()
    raise ExportError(f"{output}: no TensorRT-LLM export (no config.json with rank0.safetensors); export it first")


def releases_within(text: str) -> tuple[str, ...]:
    """``TensorRT-LLM 0.14 to 1.2`` -> those releases; all of them where the text names none."""
    named = [each for each in re.findall(r"\d+\.\d+", text) if each in RELEASES]
    if not named:
        return RELEASES
    return RELEASES[RELEASES.index(named[0]) : RELEASES.index(named[-1]) + 1]


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ExportError(f"{path}: cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise ExportError(f"{path}: holds a {type(found).__name__}, expected an object")
    return found
