"""What an undisturbed export makes of the long checkpoint, and small file systems to run out of."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def undisturbed(long_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`undisturbed("--tp", 2)` is an export of `long_checkpoint` with these options, made once. Never changed."""
    from support.exports import export

    made: dict[tuple[object, ...], Path] = {}

    def exported(*options: object) -> Path:
        if options not in made:
            made[options] = export(long_checkpoint, tmp_path_factory.mktemp("undisturbed") / "out", *options)
        return made[options]

    return exported


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """`mounted("size=64k")` is a small file system of its own; the test is skipped where none can be mounted."""
    folders: list[Path] = []

    def mount(options: str) -> Path:
        folder = tmp_path / f"mount{len(folders)}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("mounting a file system is not permitted here")
        folders.append(folder)
        return folder

    yield mount
    for folder in folders:
        subprocess.run(["umount", str(folder)], check=True)
