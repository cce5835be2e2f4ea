"""Publication: the whole export is staged in a folder beside the output and appears by rename.

Until then the output is untouched, and a failed run leaves at most the staging folder, which holds no
config.json before everything else is in place. Called by rank 0, except where said.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
from collections.abc import Collection, Iterable
from pathlib import Path

from dist_export.errors import ExportError
from dist_export.runtime.lease import NAME as LEASE
from dist_export.runtime.lease import STALE_AFTER_S, Lease, is_held

CONFIG = "config.json"
MANIFEST = "export_manifest.json"

_INSIDE = ".dist_export"  # the staging folder in an output that is a mount point
REFIT = ".refit.dist_export"
"""In an output: a refit that is being applied, or was stopped while it was (`dist_export.refit.redo`)."""
_FINISHED = ".finished-"
_REPLACED = ".replaced"

_AT_FDCWD = -100  # fcntl.h
_RENAME_EXCHANGE = 2  # linux/fs.h


def staging_folder(output: Path) -> Path:
    """Where an export to `output` is staged: a hidden folder beside it, or inside it where it is a mount point.

    Either way on the same file system, so that publishing only renames.
    """
    if os.path.ismount(output):
        return output / _INSIDE
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
    found = {name for folder in _folders(output) for name in (CONFIG, MANIFEST) if (folder / name).is_file()}
    if _visible(output) and not found:
        raise ExportError(f"{output}: holds files that are not an export; choose another output")
    if not overwrite:
        check_no_refit(output)
    if CONFIG in found and not overwrite:  # without it, it is what a run left that died while publishing
        raise ExportError(f"{output}: an export is there already; --overwrite replaces it once the new one is whole")


def check_no_refit(output: Path) -> None:
    """Raise `ExportError` where a refit of `output` was stopped while it was applied: its files are partly new.

    So are those of an output when it was a refit of a folder in it, or of the one that it lies in.
    """
    for folder in (*(_folders(output) if output.is_dir() else (output,)), output.parent):
        if os.path.isdir(folder / REFIT):
            raise ExportError(
                f"{folder}: a refit of this export is being applied, or was stopped while it was; "
                f"if none is running, finish it: dist-export refit - {folder}"
            )


def _visible(output: Path) -> list[Path]:
    """What is in an output, but for staging folders of ours (where it is a mount point) and the system's folder."""
    return [p for p in output.iterdir() if not p.name.startswith(_INSIDE) and p.name != "lost+found"]


def _folders(output: Path) -> list[Path]:
    """The folder itself and those of single targets in it."""
    return [output, *(path for path in _visible(output) if path.is_dir() and not path.is_symlink())]


class Staging:
    """The staging folder of one run, under a lease. Used by rank 0; other ranks only write files into it."""

    def __init__(self, output: Path, *, stale_after_s: float = STALE_AFTER_S) -> None:
        """Take the staging folder of `output`; `ExportError` when another run has it.

        What runs left that died while publishing is put right first.
        """
        self.output, self.folder = output, staging_folder(output)
        try:
            self.folder.mkdir(exist_ok=True)
        except OSError as error:
            raise ExportError(f"{self.folder}: cannot create the staging folder: {error.strerror}") from error
        self.lease = Lease.acquire(self.folder, stale_after_s=stale_after_s)
        self._is_publishing = False
        try:
            self._remove_finished(stale_after_s)
            self._restore_replaced()
        except BaseException:
            self.abandon(keep=True)
            raise

    def clear(self) -> None:
        """Remove what an earlier, failed run left."""
        for path in self.folder.iterdir():
            if not path.name.startswith(LEASE):
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def finish(self) -> Path:
        """Move the whole folder aside, out of reach of other runs, and return where it is now.

        Only configuration is then between it and publication. The lease goes with it.
        """
        self.lease.check(self.folder)
        self._move_aside()
        self.lease.check(self.folder)  # whoever took over in between has lost its folder, and its lease is in it
        return self.folder

    def abandon(self, *, keep: bool) -> None:
        """Give the folder up after a failure: removed, or kept for a run that resumes.

        One that `finish` has moved cannot be resumed and is removed in any case, unless it was being published.
        """
        keep = (keep and not self._is_aside) or self._is_publishing
        if not keep and self.lease.is_held(self.folder):
            with contextlib.suppress(OSError):
                self._move_aside()  # other ranks may still be creating files where it was
            shutil.rmtree(self.folder, ignore_errors=True)
        self.lease.release(self.folder)
        with contextlib.suppress(OSError):  # there is something in it
            self.folder.rmdir()

    def publish(self) -> None:
        """Make the finished folder visible at the output and give up the lease. All files must be on disk."""
        self._is_publishing = True
        publish(self.folder, self.output)
        self.lease.release(self.folder)

    @property
    def _is_aside(self) -> bool:
        return self.folder != staging_folder(self.output)

    def _move_aside(self) -> None:
        if not self._is_aside:
            aside = self.folder.with_name(f"{self.folder.name}{_FINISHED}{self.lease.token}")
            os.rename(self.folder, aside)
            self.folder = aside

    def _remove_finished(self, stale_after_s: float) -> None:
        """Folders of runs that died while publishing; `ExportError` when one of them is alive."""
        prefix = self.folder.name + _FINISHED
        for path in [path for path in self.folder.parent.iterdir() if path.name.startswith(prefix)]:
            if is_held(path, stale_after_s=stale_after_s):
                raise ExportError(f"{self.output}: another export is being published there; wait for it")
            grave = path.with_name(f"{prefix}{self.lease.token}.removed")
            with contextlib.suppress(OSError):  # it has just been published after all
                os.rename(path, grave)  # so that nobody can publish what is being removed
                shutil.rmtree(grave)

    def _restore_replaced(self) -> None:
        """An export that was moved away for a new one goes back when the new one never came."""
        old = _replaced(self.output)
        if old.is_dir() and not self.output.exists():
            os.rename(old, self.output)


def _replaced(output: Path) -> Path:
    return output.parent / f".{output.name}.dist_export{_REPLACED}"


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
    try:
        sync_folder(folder)
        if folder.parent == output:
            _publish_inside(folder, output)
        else:
            for path in folder.glob(f"{LEASE}*"):
                path.unlink()
            _replace(folder, output)
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
    if not output.exists() or not any(output.iterdir()):
        os.rename(folder, output)
        return
    if _exchange(folder, output):
        shutil.rmtree(folder, ignore_errors=True)
        return
    old = _replaced(output)
    shutil.rmtree(old, ignore_errors=True)
    os.rename(output, old)
    try:
        os.rename(folder, output)
    except OSError:
        os.rename(old, output)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _exchange(first: Path, second: Path) -> bool:
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    paths = (os.fsencode(first), os.fsencode(second))
    return bool(renameat2(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE) == 0)


def _publish_inside(folder: Path, output: Path) -> None:
    """For an output that cannot be renamed (a mount point): every config.json goes first and comes last.

    In between the folder has none, so nothing in it looks whole; it has the new manifest, which tells a later
    run that it may go on there.
    """
    for config in [path / CONFIG for path in _folders(output)]:
        config.unlink(missing_ok=True)
        sync_folder(config.parent)
    files = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(LEASE)]
    names = [path.relative_to(folder) for path in files]
    manifests = [name for name in names if name.name == MANIFEST]
    others = [name for name in names if name.name not in (MANIFEST, CONFIG)]
    configs = [name for name in names if name.name == CONFIG]
    _move(folder, output, manifests)
    for path in _visible(output):
        _remove_old(path, kept={output / name for name in manifests})
    _move(folder, output, others)
    _move(folder, output, configs)
    shutil.rmtree(folder)


def _move(folder: Path, output: Path, names: Iterable[Path]) -> None:
    """Move files from one folder to another and wait until that is on disk."""
    targets = [output / name for name in names]
    for target in targets:
        target.parent.mkdir(exist_ok=True)
        os.replace(folder / target.relative_to(output), target)
    for parent in {output, *(target.parent for target in targets)}:
        sync_folder(parent)


def _remove_old(path: Path, *, kept: Collection[Path]) -> None:
    """Remove a file or folder of the replaced export, but for the new manifests, which are there already."""
    if path.is_dir() and not path.is_symlink():
        for below in path.iterdir():
            _remove_old(below, kept=kept)
        if not any(path.iterdir()):
            path.rmdir()
    elif path not in kept:
        path.unlink()
