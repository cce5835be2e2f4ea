"""Real Megatron checkpoints for tests, and an independent reader of their weights."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

SCRIPT = Path(__file__).parents[2] / "launch" / "make_checkpoint.py"

Option = str | int | float | bool


def make_checkpoint(
    folder: Path, *, num_processes: int | None = None, timeout: float = 120, **options: Option
) -> Path:
    """Run launch/make_checkpoint.py into `folder` and return it; `tp=2, per_layer=True` is `--tp 2 --per-layer`.

    With `num_processes` it runs under torchrun on a free port (more than tp * pp processes are data-parallel
    replicas); without, it forks tp * pp processes, which is faster. Raises RuntimeError with what it printed when it
    fails or takes more than `timeout` seconds.
    """
    launcher = [sys.executable]
    if num_processes is not None:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_processes}"]
    command = [*launcher, str(SCRIPT), str(folder), *_command_line(options)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        output, errors = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        _kill_group(process)
        output, errors = process.communicate()
        errors += f"\nno end after {timeout} s"
    if process.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{output}{errors}")
    return folder


def _command_line(options: dict[str, Option]) -> list[str]:
    arguments: list[str] = []
    for name, value in options.items():
        flag = "--" + name.replace("_", "-")
        if value is True:
            arguments.append(flag)
        elif value is not False:
            arguments += [flag, str(value)]
    return arguments


def _kill_group(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def latest_iteration(folder: Path) -> Path:
    """The iteration folder that the tracker file of a --save folder names."""
    number = int((folder / "latest_checkpointed_iteration.txt").read_text())
    return folder / f"iter_{number:07d}"


def reference_weights(iteration_folder: Path) -> dict[str, torch.Tensor]:
    """Every model tensor of a torch_dist checkpoint, whole, by its key in the checkpoint.

    Read by torch.distributed.checkpoint (and Megatron, whose classes some generations pickle into .metadata), so
    nothing of it is shared with the code under test. Optimizer state and `_extra_state` objects are left out.
    """
    import torch
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reader = FileSystemReader(iteration_folder)
        stored = reader.read_metadata().state_dict_metadata
        weights = {
            key: torch.empty(entry.size, dtype=entry.properties.dtype)
            for key, entry in stored.items()
            if isinstance(entry, TensorStorageMetadata) and not key.startswith("optimizer.")
        }
        load(weights, storage_reader=reader, no_dist=True)
    return weights


def per_layer_weights(iteration_folder: Path) -> dict[str, torch.Tensor]:
    """`reference_weights` in one form whatever the key layout: `decoder.layers.{layer}.…`, gate and up in one fc1."""
    import torch

    weights: dict[str, torch.Tensor] = {}
    stored = reference_weights(iteration_folder)
    for key, tensor in stored.items():
        if re.match(r"decoder\.layers\.(?!\d)", key):
            suffix = key.removeprefix("decoder.layers.")
            weights |= {f"decoder.layers.{layer}.{suffix}": part for layer, part in enumerate(tensor)}
        elif re.search(r"linear_fc1\.(weight|bias)_w$", key):
            weights[key.removesuffix("_w")] = torch.cat([tensor, stored[key.removesuffix("_w") + "_v"]])
        elif not re.search(r"linear_fc1\.(weight|bias)_v$", key):
            weights[key] = tensor
    return weights
