"""Exports with planted faults whose manifests agree with them: what a fault in rules, plan or executor would leave."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from support.small_models import SmallModel
from support.torch_dist import megatron_chunks, write_torch_dist

from dist_export import api
from dist_export.api import Source
from dist_export.runtime.group import Group
from dist_export.session import ExportSession, RunOptions
from dist_export.targets.huggingface.target import HuggingFaceOptions
from dist_export.targets.trtllm.target import TrtllmOptions
from dist_export.tensors.safetensors_format import read_header
from dist_export.verify.findings import LEVELS, VerifyReport
from dist_export.verify.run import VerifyOptions, plan_from_manifest, source_from_manifest, verify_export

MANIFEST = "export_manifest.json"
Tensors = dict[str, dict[str, np.ndarray]]
"""File -> tensor -> raw elements as unsigned integers, writable: what is changed in place is written back."""


def save(folder: Path, model: SmallModel) -> Path:
    """A model as a checkpoint saved by a tp 2 x pp 2 training run."""
    return write_torch_dist(folder, model.tensors, args=model.args, chunks=megatron_chunks(tp=2, pp=2))


def export_to(
    checkpoint: Path,
    output: Path,
    *targets: TrtllmOptions | HuggingFaceOptions,
    overrides: Mapping[str, object] | None = None,
) -> Path:
    """Export in this process, so that a test may plant a fault in the code that does it."""
    given = dict(overrides or {})
    model = api.open_model(
        Source(checkpoint=checkpoint, overrides={name: (value, "command line") for name, value in given.items()})
    )
    job = api.plan_job(model, targets or (TrtllmOptions(),))
    request = {"iteration": None, "family": None, "overrides": given}
    with Group.single() as group:
        ExportSession(model.checkpoint, job, RunOptions(output=output), group, request).run()
    return output


def change(output: Path, edit: Callable[[Tensors], object]) -> None:
    """Edit an export's tensors and make its manifest agree: as if the exporter had written them so."""
    tensors: Tensors = {}
    for path in sorted(output.glob("*.safetensors")):
        tensors[path.name] = {}
        for name, stored in read_header(path).items():
            raw = np.fromfile(path, f"u{stored.dtype.itemsize}", stored.num_bytes // stored.dtype.itemsize,
                              offset=stored.offset)  # fmt: skip
            tensors[path.name][name] = raw.reshape(stored.shape)
    edit(tensors)
    manifest = read_manifest(output)
    for file, contents in tensors.items():
        header = read_header(output / file)
        with (output / file).open("r+b") as stream:
            for name, values in contents.items():
                assert values.nbytes == header[name].num_bytes
                stream.seek(header[name].offset)
                stream.write(np.ascontiguousarray(values).tobytes())
                crc = zlib.crc32(np.ascontiguousarray(values).tobytes())
                manifest["files"][file]["tensors"][name]["crc32"] = f"{crc:08x}"
    write_manifest(output, manifest)


def adopt_the_plan(checkpoint: Path, output: Path) -> None:
    """Give the manifest the digest and sources of the right plan, as if a wrong table had been in use all along."""
    manifest = read_manifest(output)
    plan = plan_from_manifest(api.open_model(source_from_manifest(checkpoint, manifest)), manifest)
    manifest["target"]["plan_digest"] = plan.digest()
    write_manifest(output, manifest)


def read_manifest(output: Path) -> dict[str, Any]:
    return json.loads((output / MANIFEST).read_text())


def write_manifest(output: Path, manifest: Mapping[str, Any]) -> None:
    (output / MANIFEST).write_text(json.dumps(manifest, indent=1))


def verify(checkpoint: Path, output: Path, *levels: str, **options: Any) -> VerifyReport:
    """Verify in this process, at all levels or those given."""
    return verify_export(checkpoint, output, options=VerifyOptions(levels=levels or LEVELS, **options))


def messages(report: VerifyReport) -> list[str]:
    """``level: where: message`` of every fault."""
    return [f"{fault.level}: {fault}" for fault in report.faults]
