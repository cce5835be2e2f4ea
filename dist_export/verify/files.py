"""The files of an export against its manifest and its plan: names, sizes, headers, JSON documents, strays.

Costs no tensor data. Called on one rank.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from msgspec import Struct, field

from dist_export import export_report
from dist_export.errors import ExportError
from dist_export.plan.export import ExportPlan
from dist_export.plan.shard import ShardPlan
from dist_export.tensors.safetensors_format import StoredTensor, read_header
from dist_export.verify.findings import CHECKSUMS, PLAN, Finding

MANIFEST = "export_manifest.json"
QUANTIZATION_REPORT = "quantization_report.json"
LOADED = (".safetensors", ".bin", ".pt", ".pth", ".npz", ".index.json", ".py")
"""Endings that loaders of such folders look for: a stray file with one of them may be served."""


class FolderCheck(Struct):
    """What is wrong with a folder, and which of its tensor files can be read."""

    faults: list[Finding] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    readable: list[int] = field(default_factory=list)
    """Numbers of the files that have the header and size of their plan."""

    def add(self, level: str, where: str, message: str) -> None:
        """Note a fault."""
        self.faults.append(Finding(level, where, message))


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of an export; `ExportError` when the folder has none that can be read."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ExportError(f"{folder}: has no {MANIFEST}; it is not an export, or an unfinished one") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ExportError(f"{path}: cannot be read: {error}") from error
    for key, kind in (("files", dict), ("source", dict), ("target", dict), ("request", dict)):
        if not isinstance(manifest, dict) or not isinstance(manifest.get(key), kind):
            raise ExportError(f"{path}: is no export manifest ({key} is missing or no {kind.__name__})")
    return dict(manifest)


def check_folder(folder: Path, manifest: Mapping[str, Any], plan: ExportPlan) -> FolderCheck:
    """Everything that names, sizes, headers and documents can show."""
    check = FolderCheck()
    _check_plan(check, manifest, plan)
    for name, document in plan.documents().items():
        _check_document(check, folder / name, document)
    for number, shard in plan.shards().items():
        _check_file(check, folder, number, shard, manifest["files"].get(shard.file_name))
    _check_strays(check, folder, manifest, plan)
    return check


def _check_plan(check: FolderCheck, manifest: Mapping[str, Any], plan: ExportPlan) -> None:
    recorded = str(manifest["target"].get("plan_digest"))
    if recorded != plan.digest():
        check.add(
            PLAN,
            MANIFEST,
            f"the export was made by another plan (digest {recorded[:12]}) than this checkpoint and these options give "
            f"now ({plan.digest()[:12]}): another checkpoint, other options, other rules or another release",
        )


def _check_document(check: FolderCheck, path: Path, expected: object) -> None:
    """A JSON file must say what the plan says; differing keys are named."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        check.add(CHECKSUMS, path.name, "is missing")
        return
    except (OSError, ValueError, RecursionError) as error:
        check.add(CHECKSUMS, path.name, f"cannot be read: {error}")
        return
    for message in _different(json.loads(json.dumps(expected)), found):
        check.add(CHECKSUMS, path.name, message)


def _different(expected: object, found: object, where: str = "") -> Iterator[str]:
    if isinstance(expected, dict) and isinstance(found, dict):
        for key in sorted(expected.keys() | found.keys()):
            here = f"{where}.{key}" if where else key
            if key not in found:
                yield f"{here} is missing, expected {json.dumps(expected[key])}"
            elif key not in expected:
                yield f"{here} is {json.dumps(found[key])[:80]}, which the export did not write"
            else:
                yield from _different(expected[key], found[key], here)
    elif expected != found or type(expected) is not type(found):
        what = f"{where} is" if where else "is"
        yield f"{what} {json.dumps(found)[:80]}, expected {json.dumps(expected)[:80]}"


def _check_file(check: FolderCheck, folder: Path, number: int, shard: ShardPlan, entry: object) -> None:
    """One tensor file: its manifest entry, size and header."""
    name, before = shard.file_name, len(check.faults)
    _check_entry(check, shard, entry)
    size = len(shard.header) + shard.num_data_bytes
    try:
        actual = (folder / name).stat().st_size
    except OSError as error:
        check.add(CHECKSUMS, name, "is missing" if isinstance(error, FileNotFoundError) else str(error.strerror))
        return
    if actual != size:
        verb = "was cut short" if actual < size else "was appended to, or is of another export"
        check.add(CHECKSUMS, name, f"has {actual} bytes, expected {size}; it {verb}")
        return
    try:
        stored = read_header(folder / name)
    except ExportError as error:
        check.add(CHECKSUMS, name, str(error))
        return
    _check_header(check, shard, stored)
    if len(check.faults) == before:
        check.readable.append(number)


def _check_entry(check: FolderCheck, shard: ShardPlan, entry: object) -> None:
    """The manifest must list the tensors of the plan."""
    tensors = entry.get("tensors") if isinstance(entry, dict) else None
    if not isinstance(tensors, dict):
        check.add(CHECKSUMS, MANIFEST, f"does not list {shard.file_name}")
        return
    planned = {tensor.name: tensor for tensor in shard.tensors}
    for name in sorted(planned.keys() ^ tensors.keys()):
        verb = "lacks" if name in planned else "lists an unknown"
        check.add(CHECKSUMS, MANIFEST, f"{verb} {name} in {shard.file_name}")
    for name in planned.keys() & tensors.keys():
        said = tensors[name]
        expected = [planned[name].dtype.name, list(planned[name].shape)]
        if not isinstance(said, dict) or [said.get("dtype"), said.get("shape")] != expected:
            check.add(CHECKSUMS, MANIFEST, f"{shard.file_name}: {name} is not {expected[0]} {expected[1]} there")


def _check_header(check: FolderCheck, shard: ShardPlan, stored: Mapping[str, StoredTensor]) -> None:
    """The header must say what the plan says of every tensor."""
    planned = {tensor.name: tensor for tensor in shard.tensors}
    data_start = len(shard.header)
    for name in sorted(planned.keys() ^ stored.keys()):
        where = f"{shard.file_name}: {name}"
        check.add(CHECKSUMS, where, "is not in the file" if name in planned else "is in the file but not in the plan")
    for name in sorted(planned.keys() & stored.keys()):
        tensor, found = planned[name], stored[name]
        expected = (tensor.dtype, tensor.shape, data_start + tensor.offset)
        if expected != (found.dtype, found.shape, found.offset):
            check.add(
                CHECKSUMS,
                f"{shard.file_name}: {name}",
                f"is {found.dtype} {list(found.shape)} at byte {found.offset}, "
                f"expected {tensor.dtype} {list(tensor.shape)} at byte {expected[2]}",
            )


def _check_strays(check: FolderCheck, folder: Path, manifest: Mapping[str, Any], plan: ExportPlan) -> None:
    """Files that this export did not write. Those that a loader may take are faults, others are named."""
    known = {MANIFEST, export_report.NAME, *plan.documents(), *manifest["files"]}
    if plan.quantization is not None:
        known.add(QUANTIZATION_REPORT)
    for path in sorted(folder.iterdir()):
        if path.name in known:
            continue
        if path.name.endswith(LOADED):
            stale = ", left by an earlier export" if path.suffix == ".safetensors" else ""
            check.add(CHECKSUMS, path.name, f"is not part of this export{stale}; a loader may take it: remove it")
        else:
            check.warnings.append(f"{path.name}: is not part of this export")
    for name, entry in manifest["files"].items():
        if not isinstance(entry, dict) or "tensors" in entry:
            continue
        if not (folder / name).is_file():
            check.add(CHECKSUMS, name, "is missing")
        elif entry.get("num_bytes") not in (None, (folder / name).stat().st_size):
            size = (folder / name).stat().st_size
            check.add(CHECKSUMS, name, f"has {size} bytes, expected {entry['num_bytes']}")
