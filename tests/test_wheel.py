"""A built wheel works outside the repository, with nothing of it on the path."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from support.small_models import LLAMA, small_model
from support.torch_dist import write_torch_dist

import dist_export

pytest.importorskip("setuptools", minversion="70.1", reason="older ones need the package wheel")

ROOT = Path(__file__).parents[1]
EXTRAS = {"torch", "hf", "megatron", "modelopt", "evaluate", "mpi", "quickstart", "test"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built of a copy, which leaves nothing behind in the repository."""
    source = tmp_path_factory.mktemp("source")
    shutil.copytree(ROOT / "dist_export", source / "dist_export", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    build = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run([sys.executable, "-c", build, str(folder)], cwd=source, check=True, capture_output=True)
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of a fresh environment with the wheel. What that needs comes from this one: nothing is fetched."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", "-q"]
    subprocess.run([*pip, "--disable-pip-version-check", str(wheel)], check=True, capture_output=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "of_the_tests.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin"


def test_holds_the_whole_package(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if name.startswith("dist_export/")}
    files = (path for path in (ROOT / "dist_export").rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    assert held == {str(path.relative_to(ROOT)) for path in files}


def test_metadata(wheel: Path) -> None:
    """The version is the package's own; extras are named by what they enable, and name only each other and packages."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (each for each in archive.namelist() if each.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(archive.read(name).decode())
    assert metadata["Version"] == dist_export.__version__
    assert wheel.name.startswith(f"dist_export-{dist_export.__version__}-")
    assert set(metadata.get_all("Provides-Extra") or ()) == EXTRAS
    needed = [each for each in metadata.get_all("Requires-Dist") or () if "extra ==" not in each]
    assert needed == ["isal", "msgspec>=0.21", "numpy", "PyYAML"]


def test_works_elsewhere(installed: Path, tmp_path: Path) -> None:
    def run(*command: object) -> str:
        done = subprocess.run([*map(str, command)], cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout

    program = installed / "dist-export"
    where = run(installed / "python", "-c", "import dist_export; print(dist_export.__file__)").strip()
    assert Path(where).is_relative_to(installed.parent)
    assert run(program, "--version") == f"dist-export {dist_export.__version__}\n"
    model = small_model(LLAMA)
    write_torch_dist(tmp_path / "iter_0000010", model.tensors, args=model.args)
    run(program, "export", "iter_0000010", "out", "--num-processes", 1, "--vocab-size", 60)
    run(program, "verify", "iter_0000010", "out", "--num-processes", 1)


def test_says_what_to_install(wheel: Path, tmp_path: Path) -> None:
    """With no more than the package itself needs: plain exports work, the rest names the extra."""
    venv.create(tmp_path / "bare", with_pip=False)
    (packages,) = (tmp_path / "bare").glob("lib/python*/site-packages")
    for name in ("numpy", "numpy.libs", "isal", "msgspec", "yaml", "_yaml"):
        source = Path(sysconfig.get_path("purelib")) / name
        if source.exists():
            (packages / name).symlink_to(source)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(packages)

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [tmp_path / "bare" / "bin" / "python", "-m", "dist_export", *arguments]
        return subprocess.run([*map(str, command)], cwd=tmp_path, capture_output=True, text=True, timeout=120)

    model = small_model(LLAMA)
    write_torch_dist(tmp_path / "iter_0000010", model.tensors, args=model.args)
    alone = ("--num-processes", 1)
    done = run("export", "iter_0000010", "out", "--dtype", "float16", *alone)
    assert done.returncode == 0, done.stderr
    assert run("verify", "iter_0000010", "out", *alone).returncode == 0
    for arguments in (
        ("export", "iter_0000010", "fp8", "--quantization", "fp8_per_channel", *alone),
        ("generate", "out", "--tokens", 1),
        ("evaluate", "out", "--data", "texts.jsonl"),
        ("verify", "iter_0000010", "out", "--logits", *alone),
    ):
        refused = run(*arguments)
        assert refused.returncode == 2 and "pip install 'dist-export[torch]'" in refused.stderr, refused.stderr
        assert "Traceback" not in refused.stderr
