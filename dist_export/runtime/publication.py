"""Publication: the whole export is staged in a folder beside the output and appears by rename.

Until then the output is untouched, and a failed run leaves at most the staging folder, which holds no
config.json before everything else is in place. Called by rank 0, except where said.
"""

from __future__ import annotations

import ctypes
import os
import shutil
from pathlib import Path

from dist_export.errors import ExportError
from dist_export.runtime.lease import NAME as LEASE
from dist_export.runtime.lease import STALE_AFTER_S, Lease, is_held

CONFIG = "config.json"
MANIFEST = "export_manifest.json"

_AT_FDCWD = -100  # fcntl.h
_RENAME_EXCHANGE = 2  # linux/fs.h


def staging_folder(output: Path) -> Path:
    """Where an export to `output` is staged: a hidden folder beside it, or inside it where it is a mount point.

    Either way on the same file system, so that publishing only renames.
    """
    if os.path.ismount(output):
        return output / ".dist_export"
    return output.parent / f".{output.name}.dist_export"


def check_output(output: Path, *, overwrite: bool) -> None:
    """Raise `ExportError` unless an export may be published at `output`. Changes nothing.

    An existing export is only replaced when asked, and nothing but an export (or an empty folder) ever is.
    """
    if not output.parent.is_dir():
        raise ExportError(f"{output}: the folder {output.parent} does not exist; create it first")
    staged_in = staging_folder(output).parent
    if not os.access(staged_in, os.W_OK | os.X_OK):
        raise ExportError(f"{output}: no permission to write in {staged_in}")
    if not os.path.lexists(output):
        return
    if not output.is_dir() or output.is_symlink():
        raise ExportError(f"{output}: exists and is not a folder; choose another output")
    names = {path.name for path in output.iterdir() if not path.name.startswith(".dist_export")} - {"lost+found"}
    if names and not any((folder / name).is_file() for folder in _folders(output) for name in (MANIFEST, CONFIG)):
        raise ExportError(f"{output}: holds files that are not an export; choose another output")
    if names and not overwrite:
        raise ExportError(f"{output}: an export is there already; --overwrite replaces it once the new one is whole")


def _folders(output: Path) -> list[Path]:
    """The folder itself and those of single targets in it."""
    return [output, *(path for path in output.iterdir() if path.is_dir())]


class Staging:
    """The staging folder of one run, under a lease. Used by rank 0; other ranks only write files into it."""

    def __init__(self, output: Path, *, stale_after_s: float = STALE_AFTER_S) -> None:
        """Take the staging folder of `output`; `ExportError` when another run has it."""
        self.output, self.folder = output, staging_folder(output)
        try:
            self.folder.mkdir(exist_ok=True)
        except OSError as error:
            raise ExportError(f"{self.folder}: cannot create the staging folder: {error.strerror}") from error
        self.lease = Lease.acquire(self.folder, stale_after_s=stale_after_s)
        self._remove_finished(stale_after_s)

    def clear(self) -> None:
        """Remove what an earlier, failed run left."""
        for path in self.folder.iterdir():
            if not path.name.startswith(LEASE):
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def finish(self) -> Path:
        """Move the whole folder aside, out of reach of other runs, and return where it is now.

        Only its lease and configuration are then between it and publication.
        """
        self.lease.check()
        finished = self.folder.with_name(f"{self.folder.name}{_FINISHED}{self.lease.token}")
        os.rename(self.folder, finished)
        self.lease.release()
        return finished

    def abandon(self, *, keep: bool) -> None:
        """Give the folder up after a failure: removed, or kept for a run that resumes."""
        self.lease.release()
        if not keep:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _remove_finished(self, stale_after_s: float) -> None:
        """Folders of runs that died while publishing."""
        for path in self.folder.parent.glob(f"{self.folder.name}{_FINISHED}*"):
            if not is_held(path, stale_after_s=stale_after_s):
                shutil.rmtree(path, ignore_errors=True)


_FINISHED = ".finished-"


def write_file(path: Path, data: bytes) -> None:
    """Write a small file and wait until it is on disk."""
    try:
        with path.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise ExportError(f"{path}: cannot write: {error.strerror}") from error


def publish(folder: Path, output: Path) -> None:
    """Make a finished folder visible at `output`, replacing what is there. All files must be on disk."""
    for path in folder.glob(f"{LEASE}*"):
        path.unlink()
    sync_folder(folder)
    try:
        if folder.parent == output:
            _publish_inside(folder, output)
        elif output.exists() and any(output.iterdir()):
            _replace(folder, output)
        else:
            os.rename(folder, output)
    except OSError as error:
        raise ExportError(f"{output}: cannot publish: {error.strerror}; the export is in {folder}") from error
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
    """For an output that cannot be renamed (a mount point): every config.json goes first and comes last.

    In between the folder has none, so nothing in it looks whole.
    """
    for config in [path / CONFIG for path in _folders(output) if path != folder]:
        config.unlink(missing_ok=True)
        sync_folder(config.parent)
    for path in [path for path in output.iterdir() if path != folder and path.name != "lost+found"]:
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    files = [path for path in folder.rglob("*") if path.is_file()]
    for path in sorted(files, key=lambda path: path.name == CONFIG):
        target = output / path.relative_to(folder)
        target.parent.mkdir(exist_ok=True)
        if path.name == CONFIG:
            sync_folder(target.parent)
        os.replace(path, target)
        sync_folder(target.parent)
    shutil.rmtree(folder)
