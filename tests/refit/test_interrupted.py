"""A refit that is killed anywhere: before it is committed the export is what it was, after that the next one finishes
it, and until then nothing takes the folder for an export."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from support.refits import (  # noqa: E402
    NEW,
    OLD,
    OPTIONS,
    REDO,
    assert_same_export,
    contents,
    exports_of_both,
    names,
    run,
)  # fmt: skip

from dist_export.refit.redo import Redo  # noqa: E402

PROGRAM = Path(__file__).parent / "killed_refit.py"
BEFORE = ("logging", "logged", "prepared")
AFTER = ("committed", "withheld", "a block", "blocks", "a document", "documents")


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A --save folder, an export of its iteration 10, and one of its iteration 20."""
    return exports_of_both(tmp_path_factory.mktemp("interrupted"), padded_vocab_size=2048)


@pytest.fixture
def output(exports: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the old export."""
    return Path(shutil.copytree(exports["old"], tmp_path / "out"))


@pytest.fixture(scope="module")
def committed(exports: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The old export, of which a refit was killed as soon as it was committed. Never changed."""
    output = Path(shutil.copytree(exports["old"], tmp_path_factory.mktemp("committed") / "out"))
    kill("committed", exports["save"], output)
    return output


@pytest.fixture
def stopped(committed: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(committed, tmp_path / "out"))


def kill(point: str, save: Path, output: Path, num_processes: int = 1) -> None:
    """Refit with a process that kills itself at `point`."""
    command = [sys.executable, str(PROGRAM), point, "refit", str(save), str(output), "--iteration", str(NEW)]
    ended = subprocess.run(
        [*command, "--num-processes", str(num_processes)], capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == (-9 if num_processes == 1 else 3), ended.stdout + ended.stderr


@pytest.mark.parametrize("point", BEFORE)
def test_before_the_commit_the_export_is_untouched(point: str, exports: dict[str, Path], output: Path) -> None:
    kill(point, exports["save"], output)
    assert contents(output) == contents(exports["old"])
    assert run("verify", exports["save"], output) == 0
    assert run("refit", exports["save"], output, "--iteration", NEW) == 0
    assert_same_export(output, exports["new"])
    assert [path.name for path in output.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("point", AFTER)
def test_after_the_commit_the_next_run_finishes(
    point: str, exports: dict[str, Path], output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save = exports["save"]
    kill(point, save, output)
    assert (output / REDO).is_dir()
    assert point in ("committed", "documents") or not list(output.glob("*/config.json"))
    capsys.readouterr()
    for command in (("verify", save, output), ("export", save, output), ("verify", save, output / "hf")):
        assert run(*command) == 2
        assert f"finish it: dist-export refit - {output}" in capsys.readouterr().err
    assert run("refit", save, output, "--delta-dir", output.parent / "delta") == 2
    assert run("refit", "-", output) == 0
    assert "finished the refit of" in capsys.readouterr().out
    assert_same_export(output, exports["new"])
    assert run("verify", save, output) == 0
    assert [path.name for path in output.parent.iterdir()] == ["out"]


def test_the_same_command_finishes_and_goes_on(exports: dict[str, Path], output: Path) -> None:
    """With another iteration than the one that was stopped, by several processes, of which one is killed."""
    kill("a block", exports["save"], output, num_processes=2)
    assert run("refit", exports["save"], output, "--iteration", OLD) == 0
    assert_same_export(output, exports["old"])


def test_killed_while_it_finishes_a_killed_one(exports: dict[str, Path], output: Path) -> None:
    for point in ("a block", "a document", "documents"):
        kill(point, exports["save"], output)
    assert run("refit", "-", output) == 0
    assert_same_export(output, exports["new"])


def test_an_export_replaces_a_stopped_refit(exports: dict[str, Path], stopped: Path) -> None:
    assert run("export", exports["save"], stopped, "--iteration", NEW, *OPTIONS, "--overwrite") == 0
    assert_same_export(stopped, exports["new"])


@pytest.mark.parametrize("step", range(1, 4))
def test_stopped_between_the_phases(step: int, exports: dict[str, Path], stopped: Path) -> None:
    """The phases of the application one by one, each done twice, as a run that is stopped within it would."""
    redo = Redo(stopped)
    phases: list[Callable[[], object]] = [
        redo.withhold_configurations,
        lambda: redo.write_blocks(redo.logs, lambda _read, _written: None),
        redo.place_documents,
    ]
    for phase in phases[:step]:
        phase()
        phase()
    assert run("refit", "-", stopped) == 0
    assert_same_export(stopped, exports["new"])


Damage = Callable[[Path], object]


def cut(path: Path, num_bytes: int) -> None:
    path.write_bytes(path.read_bytes()[:num_bytes])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES: dict[str, tuple[Damage, str]] = {
    "blocks cut": (lambda redo: cut(redo / "logs/00000.blocks", 100), "00000.blocks: is missing or not of"),
    "blocks flipped": (lambda redo: flip(redo / "logs/00000.blocks"), "has another checksum; the log is damaged"),
    "index cut": (lambda redo: cut(redo / "logs/00000.index", 50), "does not hold what 00000.index says"),
    "no record": (lambda redo: (redo / "commit.json").unlink(), "commit.json: cannot be read"),
    "no JSON": (lambda redo: cut(redo / "commit.json", 40), "commit.json: cannot be read"),
    "a path that leads out": (
        lambda redo: (redo / "commit.json").write_text(
            (redo / "commit.json").read_text().replace("trtllm/rank0.safetensors", "trtllm/../../secret")
        ),
        "is no file of this export",
    ),
    "another export": (
        lambda redo: (redo.parent / "hf" / "export_manifest.json").write_text("{}"),
        "belongs to another export",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_log_is_refused(damage: str, stopped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    secret = stopped.parent / "secret"
    secret.write_text("mine")
    make, message = DAMAGES[damage]
    make(stopped / REDO)
    capsys.readouterr()
    assert run("refit", "-", stopped) == 2
    assert message in capsys.readouterr().err
    assert secret.read_text() == "mine"
    assert not (damage == "blocks flipped" and list(stopped.glob("*/config.json")))


def test_what_the_system_refuses_can_be_done_later(
    exports: dict[str, Path], stopped: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not taken for another export, and with a word of how to go on."""
    for name in ("hf/config.json", "trtllm/export_report.html", "hf/export_manifest.json"):  # a folder in its place
        place, aside = stopped / name, stopped.parent / "aside"
        if place.exists():
            place.rename(aside)
        place.mkdir()
        capsys.readouterr()
        assert run("refit", "-", stopped) == 2
        error = capsys.readouterr().err
        assert f"{place}: cannot " in error and ": Is a directory" in error and "remove" not in error.lower(), error
        assert f"the refit is not finished: dist-export refit - {stopped} goes on with it" in error
        place.rmdir()
        if aside.exists():
            aside.rename(place)
    assert run("refit", "-", stopped) == 0
    assert_same_export(stopped, exports["new"])


def test_the_only_copy_of_the_new_blocks_is_never_to_be_removed(
    stopped: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = stopped / "hf" / "export_manifest.json"
    manifest.write_text("{}")
    assert run("refit", "-", stopped) == 2
    assert f"belongs to another export than {manifest}. Remove that folder" in capsys.readouterr().err
    (stopped / "trtllm" / "config.json").unlink()  # as a refit begins
    assert run("refit", "-", stopped) == 2
    error = capsys.readouterr().err
    assert "export the checkpoint anew with --overwrite" in error and "remove" not in error.lower()


def test_of_a_folder_in_the_output_or_around_it(
    exports: dict[str, Path], stopped: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Wherever it is looked for, what is said is where it can be finished."""
    assert run("refit", "-", stopped / "trtllm") == 2
    assert f"finish it: dist-export refit - {stopped}\n" in capsys.readouterr().err
    assert run("refit", "-", stopped) == 0
    assert_same_export(stopped, exports["new"])
    kill("withheld", exports["save"], stopped / "trtllm")
    capsys.readouterr()
    for command in (("refit", exports["save"]), ("refit", "-"), ("verify", exports["save"])):
        assert run(*command, stopped) == 2
        assert f"finish it: dist-export refit - {stopped / 'trtllm'}\n" in capsys.readouterr().err
    assert run("refit", "-", stopped / "trtllm") == 0
    assert run("verify", exports["save"], stopped) == 0
    assert run("refit", "-", stopped / "nowhere") == 2
    assert "nowhere: no such folder" in capsys.readouterr().err


def test_two_at_once(exports: dict[str, Path], output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The lease is the one of exports."""
    from dist_export.runtime.publication import Staging

    staging = Staging(output)
    before = contents(output)
    assert run("refit", exports["save"], output, "--iteration", NEW) == 2
    assert "another export to this output is running" in capsys.readouterr().err
    staging.abandon(keep=False)
    assert contents(output) == before and names(output.parent) == sorted(f"out/{name}" for name in names(output))
