"""The export that a refit starts from: how it was asked for, and whether new weights fit into its files."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from dist_export import api
from dist_export.api import OpenedModel, Source
from dist_export.checkpoint.open import Checkpoint
from dist_export.errors import ExportError, Faults
from dist_export.plan.export import ExportPlan
from dist_export.plan.job import ExportJob
from dist_export.plan.shard import ShardPlan
from dist_export.refit.redo import FolderChange, digest_of
from dist_export.runtime.publication import CONFIG, MANIFEST, check_no_refit
from dist_export.targets.registry import TARGETS
from dist_export.tensors.safetensors_format import read_header
from dist_export.verify.files import read_manifest
from dist_export.verify.run import find_exports, options_from_manifest, source_from_manifest

ANEW = "export the checkpoint anew with dist-export export --overwrite"
_PROVENANCE = ("producer", "transformers_version")
"""Keys of documents that say who wrote them."""
_MOST_NAMED = 5


class BaseFolder(Struct, frozen=True):
    """One target's folder of the export."""

    folder: str
    """Within the output: ``.``, or the name of a target."""
    path: Path
    manifest: Mapping[str, Any]
    manifest_digest: str
    content: str
    """`content_digest` of the manifest."""

    @property
    def iteration(self) -> object:
        """The iteration that it was made from, None where it has no number."""
        return self.manifest["source"].get("iteration")

    @property
    def tensor_files(self) -> list[str]:
        """Names of its files of tensors, in the order of their numbers."""
        return [name for name, entry in self.manifest["files"].items() if "tensors" in entry]

    def change(self, documents: Path, *, remove: Sequence[str] = ()) -> FolderChange:
        """What a refit with those new documents makes of it."""
        return FolderChange(self.folder, self.manifest_digest, digest_of(documents / MANIFEST), tuple(remove))


class Base(Struct, frozen=True):
    """An export, of one target or of several."""

    output: Path
    folders: tuple[BaseFolder, ...]

    @classmethod
    def read(cls, output: Path) -> Base:
        """The export in a folder, from its manifests alone. Raises `ExportError` when there is no whole one."""
        folders = []
        for path in find_exports(output):
            if not (path / CONFIG).is_file():
                raise ExportError(f"{path}: has no {CONFIG}; it is an unfinished export: {ANEW}")
            name = "." if path == output else path.name
            digest = digest_of(path / MANIFEST)  # first, so that `check_current` finds one that comes in between
            manifest = read_manifest(path)
            folders.append(BaseFolder(name, path, manifest, digest, _content(path, manifest)))
        if any(_asked(each) != _asked(folders[0]) for each in folders):
            raise ExportError(f"{output}: its targets were exported differently; refit each of their folders by itself")
        return cls(output, tuple(_in_order(folders)))

    @property
    def request(self) -> dict[str, Any]:
        """How the export was asked for, but for its targets and the iteration."""
        return _asked(self.folders[0])

    @property
    def iterations(self) -> str:
        """Those that it was made from, for people."""
        return " and ".join(dict.fromkeys(str(each.iteration) for each in self.folders))

    @property
    def has_sha256(self) -> bool:
        """Whether its manifests have SHA-256 of the files."""
        return any("sha256" in entry for each in self.folders for entry in each.manifest["files"].values())

    def source(
        self,
        checkpoint: Path,
        *,
        iteration: int | None = None,
        base: Path | None = None,
        calibration: Path | None = None,
        index_cache: Path | None = None,
        code_allowed: bool = False,
    ) -> Source:
        """The new checkpoint, read as the old one was. What is given here says where things are now.

        Raises `ExportError` for a calibration that the export did not have, and where it had one and none is given: the
        recorded file has the scales of the old weights.
        """
        first = self.folders[0]
        source = source_from_manifest(checkpoint, first.manifest, base=base, code_allowed=code_allowed)
        said = first.manifest.get("model") or {}
        overrides = {
            name: (value, str(said[name]["from"]) if name in said else where)
            for name, (value, where) in source.overrides.items()
        }
        if calibration is not None and source.calibration is None:
            raise ExportError(f"--calibration {calibration}: the export was made without; {ANEW}")
        if calibration is None and source.calibration is not None:
            raise ExportError(
                f"{self.output}: was exported with --calibration {source.calibration}, the scales of iteration "
                f"{self.iterations}; give --calibration FILE with those of the new iteration, or that one to keep them"
            )
        return replace(
            source,
            iteration=iteration,
            overrides=overrides,
            calibration=calibration,
            index_cache=index_cache,
        )

    def new_request(self, source: Source) -> dict[str, Any]:
        """How a fresh export of `source` would have been asked for."""
        request = {**self.request, "iteration": source.iteration}
        for name, path in (("base", source.base), ("calibration", source.calibration)):
            if path is not None:
                request[name] = str(path.absolute())
        return request

    def plan(self, source: Source, checkpoint: Checkpoint | None = None) -> tuple[OpenedModel, ExportJob]:
        """The new checkpoint (opened here unless given), and its export with the recorded options."""
        model = api.open_model(source, checkpoint)
        plans = tuple(
            api.plan(model, options_from_manifest(each.manifest), family=source.family, folder=each.folder)
            for each in self.folders
        )
        return model, ExportJob(plans)

    def check(self, job: ExportJob, *, in_place: bool) -> None:
        """Raise `ExportError` with all reasons for which the new weights cannot take the place of the old ones.

        Names, types, shapes and places of the tensors must be the same, and so must the configuration.
        """
        if in_place:
            self.check_writable()
        faults = Faults("the checkpoint cannot take the place of the exported one")
        for each, plan in zip(self.folders, job.plans, strict=True):
            faults.extend(_document_faults(each, plan))
            names = [shard.file_name for shard in plan.each_shard()]
            if sorted(names) != sorted(each.tensor_files):
                number = len(each.tensor_files)
                faults.add(f"{each.path}: holds {number} tensor files, the checkpoint makes {len(names)}")
                continue
            for shard in plan.each_shard():
                faults.extend(_file_faults(each.path / shard.file_name, shard))
        if faults:
            faults.add(f"what to do: {ANEW}")
        faults.raise_if_any()

    def check_current(self) -> None:
        """Raise `ExportError` unless the output still holds the export that was read."""
        check_no_refit(self.output)
        for each in self.folders:
            if digest_of(each.path / MANIFEST) != each.manifest_digest:
                raise ExportError(f"{each.path}: was replaced by another run meanwhile; start again")

    def check_writable(self) -> None:
        """Raise `ExportError` for what cannot be changed in place. Found out before anything is changed."""
        faults = Faults(f"{self.output}: cannot be changed in place")
        for folder in dict.fromkeys((self.output, *(each.path for each in self.folders))):
            if not os.access(folder, os.W_OK | os.X_OK):
                faults.add(f"{folder}: no permission to write in this folder")
        for path in (each.path / name for each in self.folders for name in each.tensor_files):
            try:
                num_links = path.lstat().st_nlink
            except OSError as error:
                faults.add(f"{path}: {error.strerror}")
                continue
            if path.is_symlink():
                faults.add(f"{path}: is a symbolic link; what it leads to would change: copy the export first (cp -rL)")
            elif num_links > 1:
                faults.add(f"{path}: has {num_links} hard links, and all would change; copy the export first (cp -r)")
            elif not os.access(path, os.W_OK):
                faults.add(f"{path}: no permission to write")
        faults.raise_if_any()


def content_digest(manifest: Mapping[str, Any]) -> str:
    """SHA-256 over names, types, shapes and checksums of all tensors: the same for equal exports, whenever made."""
    files = {
        name: {n: [t["dtype"], t["shape"], t["crc32"]] for n, t in entry["tensors"].items()}
        for name, entry in manifest["files"].items()
        if "tensors" in entry
    }
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def _content(folder: Path, manifest: Mapping[str, Any]) -> str:
    try:
        return content_digest(manifest)
    except (LookupError, TypeError, AttributeError) as error:
        raise ExportError(f"{folder / MANIFEST}: does not list the tensors as it should ({error}); {ANEW}") from error


def _asked(folder: BaseFolder) -> dict[str, Any]:
    others = ("target", "options", "iteration")
    return {name: value for name, value in folder.manifest["request"].items() if name not in others}


def _in_order(folders: Sequence[BaseFolder]) -> Sequence[BaseFolder]:
    """In the order of the job that made them, which the digest of the job shows, in one of their manifests."""
    if len(folders) > len(TARGETS):  # no job makes as many, and there would be too many orders
        return folders
    said = {str((each.manifest.get("fingerprint") or {}).get("job")) for each in folders}
    for order in itertools.permutations(folders):
        digests = "".join(str(each.manifest["target"].get("plan_digest")) for each in order)
        if hashlib.sha256(digests.encode()).hexdigest() in said:
            return order
    return folders


def _file_faults(path: Path, shard: ShardPlan) -> Iterator[str]:
    """What keeps the tensors of a plan from being written over those of a file."""
    try:
        stored = read_header(path)
        with path.open("rb") as file:
            header = file.read(len(shard.header))
    except OSError as error:
        yield f"{path}: {error.strerror}"
        return
    if header == shard.header:
        return
    planned = {tensor.name: (tensor.dtype, tensor.shape) for tensor in shard.tensors}
    found = {name: (tensor.dtype, tensor.shape) for name, tensor in stored.items()}
    wrong = [name for name in sorted(planned.keys() | found.keys()) if planned.get(name) != found.get(name)]
    for name in wrong[:_MOST_NAMED]:
        old, new = _described(found.get(name)), _described(planned.get(name))
        yield f"{path}: {name} is {old} there, {new} of the checkpoint"
    if len(wrong) > _MOST_NAMED:
        yield f"{path}: and {len(wrong) - _MOST_NAMED} more"
    if not wrong:
        yield f"{path}: its tensors lie at other places; another release of dist_export wrote it"


def _described(tensor: tuple[object, Sequence[int]] | None) -> str:
    return "absent" if tensor is None else f"{tensor[0]} {list(tensor[1])}"


def _document_faults(folder: BaseFolder, plan: ExportPlan) -> Iterator[str]:
    for name, document in plan.documents().items():
        yield from document_faults(folder.path / name, json.loads(json.dumps(document)), "of the checkpoint")


def document_faults(path: Path, new: object, whose: str) -> Iterator[str]:
    """Where a document of the export is not what the new one says, but for who wrote it."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        yield f"{path}: cannot be read: {error}"
        return
    for key, old, value in itertools.islice(_different(found, new), _MOST_NAMED):
        yield f"{path}: {key} is {json.dumps(old)[:80]}, {whose} {json.dumps(value)[:80]}"


def _different(old: object, new: object, where: str = "") -> Iterator[tuple[str, object, object]]:
    """(key, old value, new value) where two documents differ, but for who wrote them."""
    if not isinstance(old, dict) or not isinstance(new, dict):
        if old != new or type(old) is not type(new):
            yield where or "the document", old, new
        return
    for key in sorted(old.keys() | new.keys()):
        if key not in _PROVENANCE:
            yield from _different(old.get(key), new.get(key), f"{where}.{key}" if where else key)
