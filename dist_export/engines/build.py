"""Building the engines of an export: which process builds which rank on which GPU, and publishing them together."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from msgspec import Struct

from dist_export.engines.availability import Gpu, check_gpus, check_release, installed_release, visible_gpus
from dist_export.engines.options import EngineOptions, check
from dist_export.errors import ExportError
from dist_export.runtime import publication
from dist_export.runtime.group import Group

_LAUNCHERS = ("SLURM_", "PMI_", "PMI2_", "PMIX_", "OMPI_", "PRTE_", "HYDRA_", "MPI_LOCAL", "I_MPI_", "TORCHELASTIC_")
_RANKS = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK"),
    *("MASTER_ADDR", "MASTER_PORT"),
)
_LOOK_S = 0.1
_TERMINATE_WITHIN_S = 5.0
_LAST_LINES = 12


class EngineRequest(Struct, frozen=True):
    """What was asked for."""

    output: Path
    """The folder of engines to create."""
    options: EngineOptions
    overwrite: bool = False


class _Build(Struct):
    rank: int
    gpu: Gpu
    log: Path
    process: subprocess.Popen[str] | None = None
    file: TextIO | None = None


def prepare(request: EngineRequest, config: Mapping[str, Any], valid: Sequence[str]) -> list[Gpu]:
    """Whether the engines of an export with this config.json, which `valid` releases can serve, can be built here.

    Returns the GPUs. Reads no weight and imports nothing; every process calls it before anything else is done. Raises
    `ExportError`, saying what to do.
    """
    release = installed_release()
    check_release(release, valid)
    check(request.options, config, release)
    gpus = visible_gpus()
    check_gpus(gpus, config)
    publication.check_output(request.output, overwrite=request.overwrite)
    return gpus


def build_engines(folder: Path, request: EngineRequest, group: Group, gpus: Sequence[Gpu], *, hint: str = "") -> None:
    """Build and publish the engines of the export in `folder`. All ranks of the group call it.

    Every process builds the target ranks rank, rank + world_size, …: one at a time on the GPU of its own; a process
    alone builds on all GPUs at a time (`EngineOptions.workers`). Raises `ExportError` with the end of the build's log
    and `hint`, what to do then.
    """
    release_memory()
    config = json.loads((folder / publication.CONFIG).read_text())
    world_size = config["mapping"]["world_size"]
    staging = publication.Staging(request.output) if group.rank == 0 else None
    try:
        if staging is not None:
            staging.clear()
        group.barrier("engine folder made")
        place = publication.staging_folder(request.output)
        mine = list(range(group.rank, world_size, group.world_size))
        _build_all(mine, folder, place, request.options, group, _own_gpus(gpus, group, request.options))
        group.barrier("engines built")
        if staging is not None:
            _publish(staging, world_size, dry_run=request.options.dry_run)
    except BaseException as error:
        if isinstance(error, ExportError):
            error = ExportError(f"{error}\n{hint}" if hint else str(error))
            group.fail(error)
        if staging is not None:
            staging.abandon(keep=False)
        raise error
    group.barrier("engines published")


def release_memory() -> None:
    """Give back what a conversion in this process has kept of a GPU. Does not import torch."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _own_gpus(gpus: Sequence[Gpu], group: Group, options: EngineOptions) -> list[Gpu]:
    """Those that this process builds on, one build each."""
    if group.world_size == 1:
        return [gpus[n % len(gpus)] for n in range(options.workers or len(gpus))]
    return [gpus[group.world.local_rank % len(gpus)]]


def _build_all(
    ranks: Sequence[int], folder: Path, place: Path, options: EngineOptions, group: Group, gpus: Sequence[Gpu]
) -> None:
    """Build `ranks`, as many at a time as there are GPUs."""
    waiting, free, running = deque(ranks), deque(gpus), list[_Build]()
    try:
        while waiting or running:
            while waiting and free:
                rank = waiting.popleft()
                build = _Build(rank, free.popleft(), place / f"rank{rank}.log")
                running.append(build)
                _start(build, folder, place, options)
            time.sleep(_LOOK_S)
            group.check()
            group.progress.add(bytes_read=1)  # a build takes as long as it takes: the others wait while it lives
            for build in [each for each in running if each.process is not None and each.process.poll() is not None]:
                running.remove(build)
                free.append(build.gpu)
                _finish(build, place, options)
    finally:
        for build in running:
            _stop(build)


def _start(build: _Build, folder: Path, place: Path, options: EngineOptions) -> None:
    order = {
        "folder": str(folder),
        "rank": build.rank,
        "output": str(place),
        "options": options.as_values(),
        "parent": os.getpid(),
    }
    build.file = build.log.open("w")
    build.process = subprocess.Popen(
        [sys.executable, "-m", "dist_export.engines.worker"],
        stdin=subprocess.PIPE,
        stdout=build.file,
        stderr=subprocess.STDOUT,
        text=True,
        env=worker_environment(os.environ, build.gpu),
        start_new_session=True,
    )
    assert build.process.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # it has ended already; its log says why
        build.process.stdin.write(json.dumps(order))
        build.process.stdin.close()


def worker_environment(environ: Mapping[str, str], gpu: Gpu) -> dict[str, str]:
    """The environment of a build: one GPU, and nothing of a launcher.

    TensorRT-LLM initialises MPI when it is imported. Without a launcher's variables that makes a world of one process,
    whatever started us: under srun without a PMI plugin, or as a child of mpirun's process, it would fail or hang.
    """
    kept = {name: value for name, value in environ.items() if not name.startswith(_LAUNCHERS) and name not in _RANKS}
    root = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, (kept.get("PYTHONPATH"), root)))
    return {
        **kept,
        "CUDA_VISIBLE_DEVICES": gpu.token,
        "OMPI_MCA_ess_singleton_isolated": "1",  # Open MPI: no daemon for a world of one
        "PYTHONPATH": path,
    }


def _finish(build: _Build, place: Path, options: EngineOptions) -> None:
    """Check what an ended build left. Raises `ExportError` with the end of its log."""
    assert build.process is not None and build.file is not None
    build.file.close()
    code, engine = build.process.returncode, place / f"rank{build.rank}.engine"
    if code == 0 and (options.dry_run or engine.is_file()):
        build.log.unlink()
        return
    lines = [line for line in build.log.read_text(errors="replace").splitlines() if line.strip()][-_LAST_LINES:]
    if code == 0:
        why = f"ended without writing {engine.name}"
    elif code < 0:
        why = f"was killed by signal {-code}" + (" (out of memory?)" if code == -signal.SIGKILL else "")
    else:
        why = f"failed (exit code {code})"
    said = "\n  ".join(line.removeprefix("error: ") for line in lines)
    raise ExportError(f"the engine of target rank {build.rank} on GPU {build.gpu.token}: the build {why}:\n  {said}")


def _stop(build: _Build) -> None:
    """End a build that is still going on, and everything that it started."""
    process = build.process
    if process is not None and process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(_TERMINATE_WITHIN_S)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if build.file is not None:
        build.file.close()


def _publish(staging: publication.Staging, world_size: int, *, dry_run: bool) -> None:
    if dry_run:
        staging.abandon(keep=False)
        return
    wanted = [publication.CONFIG, *(f"rank{rank}.engine" for rank in range(world_size))]
    missing = [name for name in wanted if not (staging.folder / name).is_file()]
    if missing:
        raise ExportError(f"{staging.output}: the builds ended without writing {', '.join(missing)}")
    staging.finish()
    staging.publish()
