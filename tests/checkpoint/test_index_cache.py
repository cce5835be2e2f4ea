"""The cache of a chunk table: used when it is of these files, replaced otherwise, never trusted when damaged."""

import os
import shutil
from pathlib import Path

import pytest
from support.exports import run_command

from dist_export.checkpoint.open import open_checkpoint

CHECKPOINT = Path(__file__).parents[1] / "conformance" / "checkpoints" / "llama_core_0_16_tp2pp2"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return shutil.copytree(CHECKPOINT / "iter_0000010", tmp_path / "iter_0000010")


def test_a_cached_table_is_the_table_and_saves_reading_the_metadata(folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "table"
    first = open_checkpoint(folder, index_cache=cache)
    metadata, times = folder / ".metadata", (folder / ".metadata").stat()
    metadata.write_bytes(bytes(times.st_size))  # unreadable, but of the same size and time
    os.utime(metadata, ns=(times.st_atime_ns, times.st_mtime_ns))
    again = open_checkpoint(folder, index_cache=cache)
    assert again.index.to_bytes() == first.index.to_bytes()
    assert again.arguments is not None and again.arguments["hidden_size"] == 64


def test_a_changed_checkpoint_is_read_again(folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "table"
    open_checkpoint(folder, index_cache=cache)
    before = cache.read_bytes()
    os.utime(folder / "__0_0.distcp")
    open_checkpoint(folder, index_cache=cache)
    assert cache.read_bytes() != before


@pytest.mark.parametrize("damage", [b"", b"dist_export index 1\n", b"not a cache"])
def test_a_damaged_cache_is_replaced(folder: Path, tmp_path: Path, damage: bytes) -> None:
    cache = tmp_path / "table"
    expected = open_checkpoint(folder, index_cache=cache).index.to_bytes()
    whole = cache.read_bytes()
    cache.write_bytes(damage or whole[:-5])
    assert open_checkpoint(folder, index_cache=cache).index.to_bytes() == expected
    assert cache.read_bytes() == whole


def test_a_cache_that_cannot_be_written_is_said(folder: Path, tmp_path: Path) -> None:
    process = run_command("inspect", folder, "--index-cache", tmp_path / "none" / "table")
    assert process.returncode == 2
    assert "table: cannot write: No such file or directory" in process.stderr
