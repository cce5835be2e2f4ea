"""What describes an export beside its tensor files: written by rank 0 once every byte is on disk."""

from __future__ import annotations

import json
from pathlib import Path

from dist_export import export_report
from dist_export.plan.export import ExportPlan
from dist_export.quantization_report import REPORT
from dist_export.runtime import publication
from dist_export.targets.huggingface.reference import without_code


def write_documents(
    folder: Path,
    plan: ExportPlan,
    manifest: dict[str, object],
    *,
    quantization: dict[str, object] | None,
    shown_as: Path,
) -> None:
    """Manifest, reports, copied files and configurations, config.json last. `shown_as` is the folder once published.

    Raises `ExportError` for a disk that takes no more.
    """
    if quantization is not None:
        publication.write_file(folder / REPORT, (json.dumps(quantization, indent=1) + "\n").encode())
        manifest["quantization_report"] = REPORT
    for name, source in plan.copies.items():
        publication.write_file(folder / name, without_code(name, source.read_bytes()))
    _write_json(folder / publication.MANIFEST, manifest)
    page = export_report.render_folder(folder, shown_as=shown_as)
    publication.write_file(folder / export_report.NAME, page.encode())
    for name, document in plan.documents().items():
        _write_json(folder / name, document)
    publication.sync_folder(folder)


def _write_json(path: Path, document: object) -> None:
    publication.write_file(path, (json.dumps(document, indent=2) + "\n").encode())
