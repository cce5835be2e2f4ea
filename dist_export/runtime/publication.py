"""Publication: the whole export is staged in a folder beside the output and appears by rename.

Until then the output is untouched, and a failed run leaves at most the staging folder, which holds no
config.json before everything else is in place. Called by rank 0, except where said.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
from pathlib import Path

from dist_export.errors import ExportError

CONFIG = "config.json"
MANIFEST = "export_manifest.json"

_AT_FDCWD = -100  # fcntl.h
_RENAME_EXCHANGE = 2  # linux/fs.h


def staging_folder(output: Path) -> Path:
    """Where an export to `output` is staged: a hidden folder beside it, on the same file system."""
    return output.parent / f".{output.name}.dist_export"


def check_output(output: Path, *, overwrite: bool) -> None:
    """Raise `ExportError` unless an export may be published at `output`. Changes nothing.

    An existing export is only replaced when asked, and nothing but an export (or an empty folder) ever is.
    """
    if not output.parent.is_dir():
        raise ExportError(f"{output}: the folder {output.parent} does not exist; create it first")
    if not os.access(output.parent, os.W_OK | os.X_OK):
        raise ExportError(f"{output}: no permission to write in {output.parent}")
    if not os.path.lexists(output):
        return
    if not output.is_dir() or output.is_symlink():
        raise ExportError(f"{output}: exists and is not a folder; choose another output")
    names = {path.name for path in output.iterdir()}
    if names and not names & {MANIFEST, CONFIG}:
        raise ExportError(f"{output}: holds files that are not an export; choose another output")
    if names and not overwrite:
        raise ExportError(f"{output}: an export is there already; --overwrite replaces it once the new one is whole")


def create_staging(output: Path) -> Path:
    """An empty staging folder; what an earlier, failed run left there is removed."""
    folder = staging_folder(output)
    try:
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir()
    except OSError as error:
        raise ExportError(f"{folder}: cannot create the staging folder: {error.strerror}") from error
    return folder


def discard_staging(output: Path) -> None:
    """Remove the staging folder of a failed run."""
    shutil.rmtree(staging_folder(output), ignore_errors=True)


def write_file(path: Path, text: str) -> None:
    """Write a small file and wait until it is on disk."""
    try:
        with path.open("x") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise ExportError(f"{path}: cannot write: {error.strerror}") from error


def publish(output: Path) -> None:
    """Make the staged export visible at `output`, replacing what is there. All files must be on disk."""
    folder = staging_folder(output)
    sync_folder(folder)
    try:
        if output.exists() and any(output.iterdir()):
            _replace(folder, output)
        else:
            os.rename(folder, output)
    except OSError as error:
        if error.errno not in (errno.EBUSY, errno.EXDEV):
            raise ExportError(f"{output}: cannot publish: {error.strerror}; the export is in {folder}") from error
        _publish_inside(folder, output)
    sync_folder(output.parent)


def sync_folder(folder: Path) -> None:
    """Wait until a folder's entries are on disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _replace(folder: Path, output: Path) -> None:
    """Swap the two folders in one step where the kernel can, in two renames otherwise; then drop the old one."""
    if _exchange(folder, output):
        shutil.rmtree(folder)
        return
    old = output.parent / f".{output.name}.replaced"
    shutil.rmtree(old, ignore_errors=True)
    os.rename(output, old)
    os.rename(folder, output)
    shutil.rmtree(old)


def _exchange(first: Path, second: Path) -> bool:
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    paths = (os.fsencode(first), os.fsencode(second))
    return bool(renameat2(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE) == 0)


def _publish_inside(folder: Path, output: Path) -> None:
    """For an output that cannot be renamed (a mount point): its config.json goes first, the new one comes last.

    In between the folder has none, so nothing in it looks whole.
    """
    (output / CONFIG).unlink(missing_ok=True)
    sync_folder(output)
    names = sorted(path.name for path in folder.iterdir())
    stale = [path for path in output.glob("rank*.safetensors") if path.name not in names]
    for path in stale:
        path.unlink()
    for name in sorted(names, key=lambda name: name == CONFIG):
        if name == CONFIG:
            sync_folder(output)
        _move(folder / name, output / name)
    sync_folder(output)
    shutil.rmtree(folder)


def _move(source: Path, target: Path) -> None:
    try:
        os.replace(source, target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        partial = target.with_name(f".{target.name}.partial")
        shutil.copyfile(source, partial)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, target)
        source.unlink()
