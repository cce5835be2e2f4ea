"""export_manifest.json: what an export holds, where it came from, and checksums to prove it by."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable, Mapping
from datetime import datetime, timezone
from pathlib import Path

from msgspec import Struct, field, to_builtins

import dist_export
from dist_export.checkpoint.open import Checkpoint
from dist_export.convert.ledger import Run, TensorKey, checksum_of
from dist_export.convert.quality import Quality, merge
from dist_export.errors import Faults
from dist_export.plan.export import ExportPlan
from dist_export.runtime.publication import CONFIG, MANIFEST

FORMAT_VERSION = 1


class RankReport(Struct):
    """What one process did. Exchanged as JSON; sizes in bytes, times in seconds."""

    rank: int
    bytes_needed: int = 0
    bytes_read: int = 0
    bytes_read_by_calls: int = 0
    bytes_read_from_disk: int = 0
    bytes_written: int = 0
    bytes_gathered: int = 0
    """Copied from the node's own disk to the staging folder."""
    peak_memory: int = 0
    memory_at_start: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    profile: dict[str, float] = field(default_factory=dict)
    """Kind of work -> seconds of all threads together, where a profile was asked for."""
    sha256: dict[str, str] = field(default_factory=dict)
    """File number -> SHA-256, where asked for."""
    quality: dict[str, list[float]] = field(default_factory=dict)
    """What codes are worth: "file/tensor" numbers -> the sums of `Quality`."""
    runs: dict[str, list[list[int]]] = field(default_factory=dict)
    """"file/tensor" numbers -> [[offset, length, crc32], …], neighbours merged."""

    @property
    def working_seconds(self) -> float:
        """From the first byte read to the last byte on disk."""
        return sum(self.seconds.get(phase, 0.0) for phase in ("transfer", "gather", "sync"))

    @property
    def memory_growth(self) -> int:
        """Peak resident size above that before the work began, in bytes."""
        return max(self.peak_memory - self.memory_at_start, 0)

    def encode(self) -> bytes:
        """As bytes for another rank."""
        return json.dumps(to_builtins(self)).encode()

    @staticmethod
    def decode(data: bytes) -> RankReport:
        """What `encode` made."""
        return RankReport(**json.loads(data))

    def set_runs(self, runs: Mapping[TensorKey, Iterable[Run]]) -> None:
        """Take over the ledger of this process."""
        self.runs = {f"{file}/{index}": [list(run) for run in each] for (file, index), each in runs.items()}


class CollectedReports(Struct):
    """What rank 0 keeps of all ranks' reports: their statistics, and the runs of all of them by tensor."""

    reports: list[RankReport] = field(default_factory=list)
    runs: dict[str, list[Run]] = field(default_factory=dict)
    """By "file/tensor"."""
    sha256: dict[str, str] = field(default_factory=dict)
    qualities: dict[str, Quality] = field(default_factory=dict)
    """By "file/tensor"."""

    def add(self, _rank: int, data: bytes) -> None:
        """Take over one rank's encoded report."""
        report = RankReport.decode(data)
        for key, runs in report.runs.items():
            self.runs.setdefault(key, []).extend((run[0], run[1], run[2]) for run in runs)
        self.sha256 |= report.sha256
        merge(self.qualities, report.quality)
        report.runs, report.quality = {}, {}
        self.reports.append(report)


def file_entries(plan: ExportPlan, numbers: range, collected: CollectedReports) -> dict[str, object]:
    """Per output file its size and tensors with checksums. `numbers` are the job's numbers of the plan's files.

    Raises `ExportError` naming every tensor of which some byte was not written, or written twice.
    """
    faults = Faults("the export is not whole")
    files: dict[str, dict[str, object]] = {}
    for number, shard in zip(numbers, plan.each_shard(), strict=True):
        tensors = {}
        for index, tensor in enumerate(shard.tensors):
            where = f"{shard.file_name}: {tensor.name}"
            crc = checksum_of(
                collected.runs.get(f"{number}/{index}", ()), name=where, num_bytes=tensor.num_bytes, faults=faults
            )
            tensors[tensor.name] = {
                "dtype": tensor.dtype.name,
                "shape": list(tensor.shape),
                "crc32": f"{crc:08x}",
                "sources": sorted({str(piece.slab) for piece in tensor.view.pieces if piece.slab}),
                **({"steps": list(tensor.steps)} if tensor.steps else {}),
            }
        size = len(shard.header) + shard.num_data_bytes
        files[shard.file_name] = {"num_bytes": size, "tensors": tensors}
        if str(number) in collected.sha256:
            files[shard.file_name]["sha256"] = collected.sha256[str(number)]
    faults.raise_if_any()
    return dict(files)


def build_manifest(
    checkpoint: Checkpoint, plan: ExportPlan, files: Mapping[str, object], *, left_out: Mapping[str, int]
) -> dict[str, object]:
    """Everything but the timings, which `finish` adds."""
    return {
        "format_version": FORMAT_VERSION,
        "producer": {"name": "dist_export", "version": dist_export.__version__, "python": platform.python_version()},
        "source": {
            "folder": str(checkpoint.index.origin),
            "format": checkpoint.index.format,
            "iteration": checkpoint.iteration,
            "training_layout": checkpoint.training_layout,
            **({"adapters": to_builtins(checkpoint.adapters)} if checkpoint.adapters else {}),
            "ignored": {reason: to_builtins(what) for reason, what in checkpoint.index.ignored.items()},
            "elements_left_out": dict(left_out),
        },
        "target": {
            "name": plan.target,
            "architecture": plan.architecture,
            "family": plan.family.name,
            **plan.facts,
            "plan_digest": plan.digest(),
        },
        "model": {
            name: {"value": value, "from": plan.resolved.provenance[name]}
            for name, value in to_builtins(plan.resolved.config).items()
        },
        "notes": list(plan.notes),
        "serve": list(plan.serve),
        "checksum": "CRC-32 of each tensor's bytes",
        "copied": {name: str(path) for name, path in plan.copies.items()},
        "files": files,
    }


def run_statistics(reports: Iterable[RankReport]) -> dict[str, object]:
    """When and where the run finished, and per process what it read, wrote and used."""
    kept = [{k: v for k, v in to_builtins(report).items() if k not in ("runs", "quality")} for report in reports]
    finished = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return {"finished": finished, "host": platform.node(), "processes": kept}


def holds_export(folder: Path, *, fingerprint: Mapping[str, object], request: Mapping[str, object]) -> bool:
    """Whether a folder is a published export made from `fingerprint` on `request`: its manifest says so, and every
    file has its size. Reads no data."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        sizes = {name: file["num_bytes"] for name, file in manifest["files"].items()}
        asked = manifest["fingerprint"], manifest["request"]
        return (
            asked == (fingerprint, json.loads(json.dumps(request)))
            and (folder / CONFIG).is_file()
            and all((folder / name).stat().st_size == size for name, size in sizes.items())
        )
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return False  # no export, or none that says what is asked for
