"""What the commands print: plain text for people, dictionaries for ``--json``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from msgspec import to_builtins

from dist_export.api import OpenedModel
from dist_export.checkpoint.contents import contents, generation
from dist_export.checkpoint.index import CheckpointIndex
from dist_export.convert.measuring import USUAL_ROOM, measured_slabs, num_bytes_to_measure
from dist_export.convert.scale_table import entries_of
from dist_export.errors import ExportError
from dist_export.families.registry import choose_family
from dist_export.manifest import RankReport
from dist_export.models.quantization import Quantization
from dist_export.plan.job import ExportJob
from dist_export.plan.placement import make_placement, work_of
from dist_export.plan.shard import ShardPlan
from dist_export.plan.work import WorkItem, collect_uses
from dist_export.quantization_report import describe
from dist_export.runtime.progress import format_bytes, format_rate


def table(rows: Iterable[Sequence[object]], *, indent: str = "  ") -> str:
    """Rows as aligned columns."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))] if cells else []
    lines = (indent + "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells)
    return "\n".join(lines)


def inspection(model: OpenedModel) -> dict[str, Any]:
    """Everything ``inspect`` knows."""
    index, resolved = model.checkpoint.index, model.resolved
    provenance = resolved.provenance
    return {
        "folder": str(index.origin),
        "format": index.format,
        "generation": generation(index, model.checkpoint.arguments),
        "iteration": model.checkpoint.iteration,
        "adapters": to_builtins(model.checkpoint.adapters) if model.checkpoint.adapters else None,
        "contents": contents(index),
        "training_layout": model.checkpoint.training_layout,
        "num_files": len(index.files),
        "num_chunks": index.num_chunks,
        "weight_share": weight_share(index),
        "ignored": {reason: to_builtins(what) for reason, what in index.ignored.items()},
        "num_objects": len(index.objects),
        "config": {n: {"value": v, "from": provenance[n]} for n, v in to_builtins(resolved.config).items()},
        "notes": list(resolved.notes),
        "quantization": _quantization_found(model),
        "tensors": {name: {"shape": list(info.shape), "dtype": info.dtype} for name, info in index.tensors.items()},
    }


def weight_share(index: CheckpointIndex) -> float:
    """How much of what the checkpoint's tensors take is weights, from 0 to 1."""
    ignored = sum(what.num_bytes for what in index.ignored.values())
    return index.num_weight_bytes / max(index.num_weight_bytes + ignored, 1)


def inspection_text(model: OpenedModel) -> str:
    """``inspect`` for people."""
    facts = inspection(model)
    layout = " ".join(f"{axis}{size}" for axis, size in facts["training_layout"].items()) or "not said"
    ignored = [
        f"{what['num_tensors']} tensors, {format_bytes(what['num_bytes'])}: {reason}" if what["num_tensors"] else reason
        for reason, what in facts["ignored"].items()
    ]
    index = model.checkpoint.index
    head = [
        ("checkpoint", facts["folder"]),
        ("format", ", ".join(filter(None, (facts["format"], facts["generation"])))),
        ("iteration", facts["iteration"] if facts["iteration"] is not None else "not said"),
        ("trained as", layout),
        ("weights", f"{format_bytes(index.num_weight_bytes)} in {index.num_chunks} chunks of {len(index.files)} files"),
        ("", f"{facts['weight_share']:.1%} of what all its tensors take"),
        ("left out", "; ".join(ignored) or "nothing"),
        *_adapters(model),
        *_found_lines(facts["quantization"]),
        *(("also there", line) for line in facts["contents"]),
    ]
    fields = [(name, entry["value"], entry["from"]) for name, entry in facts["config"].items()]
    tensors = [
        (pattern, "x".join(map(str, shape)), model.catalog.dtype(pattern))
        for pattern, shape in sorted(model.catalog.folded_shapes().items())
    ]
    parts = [table(head), "\nmodel", table(fields), f"\ntensors ({model.catalog.num_layers} layers)", table(tensors)]
    return "\n".join(parts + _notes(facts["notes"]))


def _adapters(model: OpenedModel) -> list[tuple[str, str]]:
    """What is said of adapters, where there are any."""
    adapters = model.checkpoint.adapters
    if adapters is None:
        return []
    scale = f"alpha {adapters.alpha:g}, dim {adapters.dim}"
    where = f"into {len(model.catalog.updates)} weights of {model.checkpoint.index.folder}"
    return [("merged", f"{adapters.kind} ({scale}) {where}")]


def _quantization_found(model: OpenedModel) -> dict[str, Any] | None:
    """How an export would quantise; under ``fault`` why it could not. None for a plain model, or one of no family."""
    try:
        family = choose_family(model.resolved.config, None)
    except ExportError:
        return None  # `plan` says what is missing
    try:
        return scale_summary(model.quantization(family))
    except ExportError as error:
        return {"fault": str(error).splitlines()[0]}


def _found_lines(facts: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    if facts is not None and "fault" in facts:
        return [("quantised", f"cannot be exported so: {facts['fault']}")]
    return _quantization_lines(facts)


def plan_summary(model: OpenedModel, job: ExportJob, left_out: Mapping[str, Mapping[str, int]]) -> dict[str, Any]:
    """Everything ``plan`` knows; sizes in bytes."""
    shards = job.shards()
    slabs, fills = collect_uses(shards, job.catalog.tensors, updates=job.catalog.updates)
    placement = make_placement([0] * len(shards), [shard.num_data_bytes for shard in shards.values()])
    work = [work_of(number, placement, slabs) for number in range(len(shards))]
    reads = [sum(item.num_bytes_needed for item in items) for items in work]
    for fill in fills:
        reads[fill.output.file] += fill.num_bytes_needed
    return {
        "source": str(model.checkpoint.index.origin),
        "digest": job.digest(),
        "targets": [
            {
                "name": plan.target,
                "folder": plan.folder,
                "architecture": plan.architecture,
                "family": plan.family.name,
                "facts": dict(plan.facts),
                "options": dict(plan.options),
                "config": dict(plan.config),
                "notes": list(plan.notes),
                "elements_left_out": dict(left_out[plan.target]),
                "quantization": scale_summary(plan.quantization, work),
                "files": [_file_summary(shards[number], reads[number]) for number in job.numbered(plan)],
            }
            for plan in job.plans
        ],
    }


def scale_summary(quantization: Quantization | None, work: Sequence[Sequence[WorkItem]] = ()) -> dict[str, Any] | None:
    """How linears are quantised, where the scales come from and what it takes to find them; None when they are not.

    `work`: what a process per output file transfers, where that is known. Of what it measures it keeps in memory what
    the usual budget has room for, and reads the rest once more.
    """
    if quantization is None:
        return None
    entries = entries_of(quantization)
    measured, slabs = [entry for entry in entries if entry.stored is None], measured_slabs(entries)
    each = [num_bytes_to_measure(items, slabs) for items in work]
    kept = [min(num_bytes, USUAL_ROOM) for num_bytes in each]
    costs = {"bytes_kept_in_memory": sum(kept), "bytes_read_twice": sum(each) - sum(kept)} if work else {}
    return {
        **describe(quantization),
        "num_scales_stored": sum(entry.stored is not None for entry in entries),
        "num_scales_from_training": len(quantization.input_scales),
        "num_scales_measured": sum(entry.size for entry in measured),
        "bytes_measured": sum(entry.num_bytes for entry in measured),
        **costs,
    }


def _cost(facts: Mapping[str, Any]) -> str:
    """Of measuring weights."""
    if "bytes_read_twice" not in facts:
        return f"on {format_bytes(facts['bytes_measured'])} of weights"
    kept, again = facts["bytes_kept_in_memory"], facts["bytes_read_twice"]
    told = [
        f"kept in memory: {format_bytes(kept)}" if kept else "",
        f"read twice: {format_bytes(again)}" if again else "",
    ]
    return "weights " + ", ".join(filter(None, told))


def _quantization_lines(facts: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    if facts is None:
        return []
    linears = ", ".join(f"{count} x {scheme}" for scheme, count in facts["linears"].items()) or "none"
    cache = f"; KV cache {facts['kv_cache']}" if facts["kv_cache"] else ""
    lines = [("quantised", f"{linears}{cache}; as {facts['origin']} says")]
    if "num_scales_stored" in facts:
        text = f"{facts['num_scales_stored']} read, {facts['num_scales_from_training']} of TransformerEngine's states"
        cost = f" ({_cost(facts)})" if facts["bytes_measured"] else ""
        lines.append(("scales", f"{text}, {facts['num_scales_measured']} measured{cost}"))
    return lines


def _file_summary(shard: ShardPlan, bytes_read: int) -> dict[str, Any]:
    tensors = [
        {
            "name": t.name,
            "shape": list(t.shape),
            "dtype": t.dtype.name,
            "offset": t.offset,
            "steps": list(t.steps),
            "sources": sorted({str(p.slab) for p in t.view.pieces if p.slab}),
        }
        for t in shard.tensors
    ]
    return {
        "file": shard.file_name,
        "bytes_written": len(shard.header) + shard.num_data_bytes,
        "bytes_read": bytes_read,
        "tensors": tensors,
    }


def plan_text(summary: Mapping[str, Any]) -> str:
    """``plan`` for people."""
    lines = [table([("checkpoint", summary["source"]), ("plan", summary["digest"][:16])])]
    for target in summary["targets"]:
        head = [("target", target["name"]), ("model", f"{target['family']} -> {target['architecture']}")]
        head += _quantization_lines(target["quantization"])
        files: list[tuple[object, ...]] = [("file", "tensors", "reads", "writes")]
        for file in target["files"]:
            sizes = format_bytes(file["bytes_read"]), format_bytes(file["bytes_written"])
            files.append((file["file"], len(file["tensors"]), *sizes))
        lines += ["", table([*head, *target["facts"].items()]), "", table(files)]
        left_out = target["elements_left_out"].items()
        lines += _notes([f"left out: {count} elements, {reason}" for reason, count in left_out])
        lines += _notes(target["notes"])
    return "\n".join(lines)


def closing_text(job: ExportJob, output: Path, reports: Sequence[RankReport]) -> str:
    """The table at the end of an export, and the next command to run."""
    seconds = max(report.working_seconds for report in reports)
    rows: list[tuple[object, ...]] = [("process", "needed", "read", "from disk", "written", "memory", "seconds")]
    rows += [
        (
            report.rank,
            format_bytes(report.bytes_needed),
            f"{format_bytes(report.bytes_read)} ({report.bytes_read / max(report.bytes_needed, 1):.3f}x)",
            format_bytes(report.bytes_read_from_disk),
            format_bytes(report.bytes_written),
            f"{format_bytes(report.peak_memory)} (+{format_bytes(report.memory_growth)})",
            f"{report.working_seconds:.2f}",
        )
        for report in reports
    ]
    written = sum(report.bytes_written for report in reports)
    models = ", ".join(f"{plan.architecture} ({plan.facts['layout']})" for plan in job.plans)
    lines = [
        f"exported {job.plans[0].family.name} as {models} to {output}",
        table(rows),
        f"  {format_bytes(written)} in {seconds:.2f} s, {format_rate(written / max(seconds, 1e-9))}",
    ]
    lines += _profile_lines(reports)
    lines += _notes(dict.fromkeys(note for plan in job.plans for note in plan.notes))
    folders = ((plan, output / plan.folder if plan.folder != "." else output) for plan in job.plans)
    lines += [f"next: {command.format(output=folder)}" for plan, folder in folders for command in plan.serve[:1]]
    return "\n".join(lines)


def _profile_lines(reports: Sequence[RankReport]) -> list[str]:
    """Where the time went: seconds by kind of work, one column per process, all its threads together."""
    kinds = dict.fromkeys(kind for report in reports for kind in report.profile)
    if not kinds:
        return []
    head: tuple[object, ...] = ("seconds of work", *(f"rank {report.rank}" for report in reports[:MOST_COLUMNS]))
    rows = [(kind, *(f"{report.profile.get(kind, 0.0):.3f}" for report in reports[:MOST_COLUMNS])) for kind in kinds]
    return [table([head, *rows])]


MOST_COLUMNS = 8


def _notes(notes: Iterable[str]) -> list[str]:
    return [f"note: {note}" for note in notes]
