"""Staging and publishing on real folders; kills in between are in tests/faults."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dist_export.errors import ExportError
from dist_export.runtime import publication
from dist_export.runtime.publication import CONFIG, MANIFEST, Staging, check_output, staging_folder


def fill(folder: Path, text: str, *names: str) -> None:
    """A few files, configuration included."""
    for name in (*names, MANIFEST, CONFIG):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def texts(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in sorted(folder.rglob("*")) if p.is_file()}


def publish(output: Path, text: str, *names: str) -> None:
    """A whole run."""
    staging = Staging(output)
    staging.clear()
    fill(staging.finish(), text, *names)
    staging.publish()


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("before", ["nothing", "empty", "export"])
def test_publish(before: str, exchange: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not exchange:  # what file systems answer that have no atomic exchange
        monkeypatch.setattr(publication, "_exchange", lambda first, second: False)
    output = tmp_path / "out"
    if before != "nothing":
        output.mkdir()
    if before == "export":
        fill(output, "old", "rank0.safetensors", "rank1.safetensors")
    publish(output, "new", "rank0.safetensors")
    assert texts(output) == dict.fromkeys(["rank0.safetensors", MANIFEST, CONFIG], "new")
    assert list(tmp_path.iterdir()) == [output]


@pytest.mark.parametrize("name", ["out", "out [1]*", "ä ö"])
def test_names_that_are_patterns(name: str, tmp_path: Path) -> None:
    leftover = tmp_path / f".{name}.dist_export.finished-1234"
    fill(leftover, "dead")
    publish(tmp_path / name, "new")
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_the_exchange_is_atomic_here(tmp_path: Path) -> None:
    for name in ("a", "b"):
        fill(tmp_path / name, name)
    assert publication._exchange(tmp_path / "a", tmp_path / "b")
    assert texts(tmp_path / "a") == dict.fromkeys([MANIFEST, CONFIG], "b")
    assert not publication._exchange(tmp_path / "a", tmp_path / "nowhere")


def test_what_may_be_published_where(tmp_path: Path) -> None:
    output = tmp_path / "out"
    check_output(output, overwrite=False)
    with pytest.raises(ExportError, match="does not exist; create it first"):
        check_output(tmp_path / "no" / "out", overwrite=True)
    output.write_text("")
    with pytest.raises(ExportError, match="exists and is not a folder"):
        check_output(output, overwrite=True)
    output.unlink()
    output.symlink_to(tmp_path)
    with pytest.raises(ExportError, match="exists and is not a folder"):
        check_output(output, overwrite=True)
    output.unlink()
    output.mkdir()
    check_output(output, overwrite=False)
    (output / "notes.txt").write_text("mine")
    with pytest.raises(ExportError, match="holds files that are not an export"):
        check_output(output, overwrite=True)
    fill(output / "hf", "x")
    with pytest.raises(ExportError, match="an export is there already; --overwrite replaces it"):
        check_output(output, overwrite=False)
    check_output(output, overwrite=True)
    (output / "hf" / CONFIG).unlink()
    check_output(output, overwrite=False)  # left by a run that died while publishing to a mount point


def test_abandoned_folders(tmp_path: Path) -> None:
    output = tmp_path / "out"
    staging = Staging(output)
    (staging.folder / "rank0.safetensors").write_text("half")
    staging.abandon(keep=True)
    assert texts(staging_folder(output)) == {"rank0.safetensors": "half"}
    Staging(output).abandon(keep=True)
    assert texts(staging_folder(output)) == {"rank0.safetensors": "half"}
    Staging(output).abandon(keep=False)
    assert list(tmp_path.iterdir()) == []
    Staging(output).abandon(keep=True)  # with nothing in it
    assert list(tmp_path.iterdir()) == []


def test_abandoning_never_touches_the_folder_of_another_run(tmp_path: Path) -> None:
    output = tmp_path / "out"
    first = Staging(output)
    first.finish()
    os.rename(first.folder, tmp_path / "elsewhere")
    second = Staging(output)
    (second.folder / "rank0.safetensors").write_text("second")
    first.abandon(keep=False)
    assert (second.folder / "rank0.safetensors").read_text() == "second"
    second.lease.check(second.folder)
    second.abandon(keep=False)


def test_a_run_whose_folder_was_taken_over_publishes_nothing(tmp_path: Path) -> None:
    output = tmp_path / "out"
    first = Staging(output)
    (first.folder / "lease.json").unlink()  # as a run on another machine does that took this one for dead
    second = Staging(output)
    with pytest.raises(ExportError, match="took over this output; this one publishes nothing"):
        first.finish()
    first.abandon(keep=False)
    second.finish()
    fill(second.folder, "second")
    second.publish()
    assert texts(output) == dict.fromkeys([MANIFEST, CONFIG], "second")


def test_nobody_starts_while_another_run_is_publishing(tmp_path: Path) -> None:
    output = tmp_path / "out"
    first = Staging(output)
    folder = first.finish()
    with pytest.raises(ExportError, match="another export is being published there; wait for it"):
        Staging(output)
    fill(folder, "first")
    first.publish()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    Staging(output).abandon(keep=False)
    assert texts(output) == dict.fromkeys([MANIFEST, CONFIG], "first")


def test_an_export_that_was_moved_away_comes_back(tmp_path: Path) -> None:
    output = tmp_path / "out"
    fill(tmp_path / ".out.dist_export.replaced", "old")
    Staging(output).abandon(keep=False)
    assert texts(output) == dict.fromkeys([MANIFEST, CONFIG], "old")


def test_a_failed_publication_keeps_the_export_and_says_where(tmp_path: Path) -> None:
    output = tmp_path / "out"
    staging = Staging(output)
    fill(staging.finish(), "new")
    output.write_text("a file has come in between")
    with pytest.raises(ExportError, match=r"out: cannot publish: .*; the export is in .*\.finished-"):
        staging.publish()
    staging.abandon(keep=False)
    assert texts(staging.folder) == dict.fromkeys([MANIFEST, CONFIG], "new")


def test_an_export_that_cannot_be_replaced_goes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an atomic exchange the old export is moved away first; it returns when the new one cannot come."""
    monkeypatch.setattr(publication, "_exchange", lambda first, second: False)
    output, rename = tmp_path / "out", os.rename
    fill(output, "old")
    staging = Staging(output)
    fill(staging.finish(), "new")

    def refuse(source: Path, target: Path) -> None:
        if source == staging.folder:
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(publication.os, "rename", refuse)
    with pytest.raises(ExportError, match=r"out: cannot publish: Input/output error; the export is in .*\.finished-"):
        staging.publish()
    assert texts(output) == dict.fromkeys([MANIFEST, CONFIG], "old")
    assert texts(staging.folder)[CONFIG] == "new"


def test_a_run_that_is_taken_over_while_it_moves_its_folder_publishes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, rename = tmp_path / "out", os.rename
    first = Staging(output)

    def taken_over(source: Path, target: Path) -> None:
        monkeypatch.undo()
        (first.folder / "lease.json").unlink()
        Staging(output)
        rename(source, target)

    monkeypatch.setattr(publication.os, "rename", taken_over)
    with pytest.raises(ExportError, match="took over this output; this one publishes nothing"):
        first.finish()
    assert not output.exists()
