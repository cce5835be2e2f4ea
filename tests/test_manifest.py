"""What a manifest may say: only of a whole export, and whether a folder is the one that is asked for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dist_export.manifest import holds_export
from dist_export.runtime.publication import CONFIG, MANIFEST

FINGERPRINT = {"job": "a", "source": "b", "version": "1"}
REQUEST = {"target": "hf", "options": {"dtype": "bfloat16"}, "layers": (1, 2)}


@pytest.fixture
def export(tmp_path: Path) -> Path:
    (tmp_path / "model.safetensors").write_bytes(b"1234")
    (tmp_path / CONFIG).write_text("{}")
    files = {"model.safetensors": {"num_bytes": 4}}
    manifest = {"files": files, "fingerprint": FINGERPRINT, "request": REQUEST}
    (tmp_path / MANIFEST).write_text(json.dumps(manifest))
    return tmp_path


def test_an_export_is_the_one_asked_for_if_all_agrees(export: Path) -> None:
    assert holds_export(export, fingerprint=FINGERPRINT, request=REQUEST)
    assert not holds_export(export, fingerprint=FINGERPRINT, request={**REQUEST, "options": {"dtype": "float32"}})
    assert not holds_export(export, fingerprint={**FINGERPRINT, "source": "c"}, request=REQUEST)


@pytest.mark.parametrize("name, data", [("model.safetensors", b"123"), (MANIFEST, b"[]"), (MANIFEST, b"{")])
def test_a_folder_that_is_not_whole_is_none(name: str, data: bytes, export: Path) -> None:
    (export / name).write_bytes(data)
    assert not holds_export(export, fingerprint=FINGERPRINT, request=REQUEST)
    (export / name).unlink()
    assert not holds_export(export, fingerprint=FINGERPRINT, request=REQUEST)


def test_without_a_configuration_it_is_none(export: Path) -> None:
    (export / CONFIG).unlink()
    assert not holds_export(export, fingerprint=FINGERPRINT, request=REQUEST)
