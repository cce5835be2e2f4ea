"""Folders on the nodes' own disks, in which an export is written before it is gathered (`--local-staging`).

Each node has one, made by one of its processes, with a name that the staging folder keeps: a run that resumes finds
them, another run never does.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
from contextlib import suppress
from pathlib import Path

from dist_export.convert.journal import FOLDER as JOURNALS
from dist_export.convert.outputs import write_error
from dist_export.errors import ExportError
from dist_export.plan.job import ExportJob

_TOKEN = "local"  # beside the journals


def read_token(staging: Path) -> str:
    """What names the folders on the nodes of the run that a staging folder is of, or ``""``."""
    with suppress(OSError, UnicodeDecodeError):
        token = (staging / JOURNALS / _TOKEN).read_text()
        return token if re.fullmatch(r"[0-9a-f]{16}", token) else ""
    return ""


def write_token(staging: Path, token: str) -> None:
    """Keep the name for a run that resumes."""
    path = staging / JOURNALS / _TOKEN
    try:
        path.write_text(token)
    except OSError as error:
        raise write_error(path, error) from error


def local_folder(parent: Path, token: str) -> Path:
    """This node's folder in `parent`. Other nodes' have other names, in case `parent` is the same for several."""
    host = re.sub(r"[^A-Za-z0-9._-]", "_", socket.gethostname())
    return parent / f".dist_export-{token}-{host}"


def make_local_folder(folder: Path, job: ExportJob, *, output: Path) -> None:
    """Create this node's folder, or keep an earlier run's. One process of each node calls it. `ExportError`: cannot."""
    parent = folder.parent
    if output == parent or output in parent.parents:
        raise ExportError(f"--local-staging {parent}: must not be in OUTPUT {output}")
    if not parent.is_dir():
        raise ExportError(
            f"--local-staging {parent}: no such folder on {socket.gethostname()}; it must exist on every node"
        )
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        for name in (JOURNALS, *(plan.folder for plan in job.plans)):
            (folder / name).mkdir(exist_ok=True)
    except OSError as error:
        raise write_error(folder, error) from error


def remove_local_folder(folder: Path) -> None:
    """Remove this node's folder, if it is there; other processes may still be creating files in it."""
    grave = folder.with_name(f"{folder.name}.removed")
    with suppress(OSError):
        os.rename(folder, grave)
    shutil.rmtree(grave, ignore_errors=True)
