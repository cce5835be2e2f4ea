"""``export_report.html``: what an export is, in one page that needs nothing but a browser.

Every figure comes from the manifest (and the reports beside it), so page and manifest cannot disagree. Text from the
checkpoint is escaped; the page has no script and loads nothing.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from dist_export.errors import ExportError
from dist_export.runtime.progress import format_bytes

NAME = "export_report.html"
MANIFEST, QUANTIZATION, CONFIG = "export_manifest.json", "quantization_report.json", "config.json"
MOST_ROWS = 64
"""Ranks or files shown one by one; of more the first are shown and the others counted."""

STYLE = """
body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:60rem;padding:0 1rem;color:#1a1a1a;background:#fff}
h1{font-size:1.6rem}h2{font-size:1.15rem;margin-top:2rem;border-bottom:1px solid #ccc}
table{border-collapse:collapse;width:100%}td,th{padding:.2rem .6rem;text-align:left;vertical-align:top}
tr:nth-child(even){background:#f6f6f6}td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}
code,pre{font:13px/1.4 ui-monospace,monospace;background:#f2f2f2}pre{padding:.6rem;overflow-x:auto}
.ok{color:#0a6b2d}.bad{color:#a30000}.note{background:#fff7dc;padding:.3rem .6rem;margin:.3rem 0}
svg text{font:12px system-ui,sans-serif}
@media(prefers-color-scheme:dark){body{color:#e6e6e6;background:#161616}tr:nth-child(even){background:#202020}
code,pre{background:#242424}.note{background:#3a3312}.ok{color:#5fd38a}.bad{color:#ff8a80}svg text{fill:#e6e6e6}}
"""


def render(
    manifest: Mapping[str, Any],
    *,
    quantization: Mapping[str, Any] | None = None,
    verification: Mapping[str, Any] | None = None,
    folder: str = "OUTPUT",
) -> str:
    """The page of one export. `verification` is what ``dist-export verify --json`` printed, where it was run."""
    target = manifest["target"]
    sections = [
        f"<h1>{escape(target['architecture'])} for {escape(_runtime(target['name']))}</h1>",
        _table([(name, value) for name, value in target.items() if name != "plan_digest"]),
        *(f'<p class="note">{escape(note)}</p>' for note in manifest["notes"]),
        _section("Model", _model(manifest["model"])),
        _section("Files", _files(manifest["files"])),
        _section("Where the time went", _times(manifest["run"]["processes"])),
        _section("Memory and bytes per process", _processes(manifest["run"]["processes"])),
        _section("Quantisation", _quantization(quantization)) if quantization else "",
        _section("Verification", _verification(verification)),
        _section("Where it comes from", _provenance(manifest)),
        _section("Serve it", _commands(target["name"], folder)),
    ]
    title = f"{escape(target['architecture'])}: export report"
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head>'
        f"<body>{''.join(sections)}</body></html>\n"
    )


def render_folder(folder: Path, *, verification: Path | None = None, shown_as: Path | None = None) -> str:
    """The page of the export in a folder, called `shown_as` in commands.

    Raises `ExportError` when the folder holds none, or a file is not what it should be.
    """
    manifest = _read(folder / MANIFEST)
    quantization = _read(folder / QUANTIZATION) if (folder / QUANTIZATION).is_file() else None
    verified = _read(verification) if verification is not None else None
    try:
        shown = str(shown_as or folder)
        return render(manifest, quantization=quantization, verification=verified, folder=shown)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ExportError(f"{folder / MANIFEST}: has no {error}; it was not written by this release") from error


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise ExportError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise ExportError(f"{path}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ExportError(f"{path}: holds a {type(value).__name__}, expected an object")
    return value


def _runtime(target: str) -> str:
    return "TensorRT-LLM" if target == "trtllm" else "vLLM, SGLang and TensorRT-LLM's PyTorch backend"


def _section(title: str, body: str) -> str:
    return f"<h2>{escape(title)}</h2>{body}"


def _table(rows: Iterable[Sequence[object]], head: Sequence[str] = ()) -> str:
    top = "".join(f"<th{_numeric(i)}>{escape(name)}</th>" for i, name in enumerate(head))
    lines = [f"<tr>{top}</tr>"] if head else []
    for row in rows:
        cells = (f"<td{_numeric(i) if head else ''}>{escape(str(cell))}</td>" for i, cell in enumerate(row))
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return f"<table>{''.join(lines)}</table>"


def _numeric(column: int) -> str:
    return ' class="n"' if column else ""


def _model(model: Mapping[str, Any]) -> str:
    set_fields = {name: field for name, field in model.items() if field["value"] not in (None, False, 0, [], {})}
    return _table([(name, field["value"], field["from"]) for name, field in set_fields.items()])


def _files(files: Mapping[str, Any]) -> str:
    rows = [(name, len(file["tensors"]), format_bytes(file["num_bytes"])) for name, file in files.items()]
    total = sum(file["num_bytes"] for file in files.values())
    left = f"<p>and {len(rows) - MOST_ROWS} more</p>" if len(rows) > MOST_ROWS else ""
    return f"{_table(rows[:MOST_ROWS], ('file', 'tensors', 'size'))}{left}<p>{format_bytes(total)} in all</p>"


def _times(processes: Sequence[Mapping[str, Any]]) -> str:
    """Stacked bars: one per process, one colour per phase, lengths in seconds."""
    phases = list(dict.fromkeys(phase for each in processes for phase in each["seconds"]))
    shown = processes[:MOST_ROWS]
    longest = max((sum(each["seconds"].values()) for each in shown), default=0.0) or 1.0
    bars = []
    for line, each in enumerate(shown):
        left, y = 90.0, 24 * line + 30
        bars.append(f'<text x="0" y="{y + 13}">process {each["rank"]}</text>')
        for number, phase in enumerate(phases):
            seconds = each["seconds"].get(phase, 0.0)
            width = 640 * seconds / longest
            bars.append(
                f'<rect x="{left:.1f}" y="{y}" width="{width:.1f}" height="18" fill="{_colour(number)}">'
                f"<title>{escape(phase)}: {seconds:.3f} s</title></rect>"
            )
            left += width
        total = sum(each["seconds"].values())
        bars.append(f'<text x="{left + 6:.1f}" y="{y + 13}">{total:.2f} s</text>')
    return _svg(bars + _legend(phases), 820, 24 * len(shown) + 40)


def _processes(processes: Sequence[Mapping[str, Any]]) -> str:
    head = ("process", "needed", "read", "from disk", "written", "peak memory", "above start")
    rows = [
        (
            each["rank"],
            *(format_bytes(each[key]) for key in ("bytes_needed", "bytes_read", "bytes_read_from_disk")),
            format_bytes(each["bytes_written"]),
            format_bytes(each["peak_memory"]),
            format_bytes(max(each["peak_memory"] - each["memory_at_start"], 0)),
        )
        for each in processes[:MOST_ROWS]
    ]
    return _table(rows, head)


def _quantization(report: Mapping[str, Any]) -> str:
    """Signal-to-noise by layer as a picture, the worst tensors as a table."""
    tensors = {name: each for name, each in report["tensors"].items() if each.get("snr_db") is not None}
    layers: dict[int, list[float]] = defaultdict(list)
    for name, each in tensors.items():
        number = next((int(part) for part in name.split(".") if part.isdigit()), -1)
        layers[number].append(float(each["snr_db"]))
    worst = sorted(tensors.items(), key=lambda item: item[1]["snr_db"])[:10]
    rows = [(name, f"{each['snr_db']:.2f}", f"{100 * each['saturated']:.4f} %") for name, each in worst]
    picture = _layers({layer: min(values) for layer, values in sorted(layers.items())})
    facts = _table([(key, value) for key, value in report.items() if isinstance(value, str)])
    return f"{facts}{picture}<p>Worst:</p>{_table(rows, ('tensor', 'signal to noise, dB', 'saturated'))}"


def _layers(worst: Mapping[int, float]) -> str:
    if not worst:
        return ""
    highest = max(max(worst.values()), 1.0)
    width = max(min(760 / len(worst), 40.0), 3.0)
    bars = ['<text x="0" y="14">least signal to noise of each layer, dB</text>']
    for number, (layer, value) in enumerate(worst.items()):
        height = 140 * max(value, 0.0) / highest
        bars.append(
            f'<rect x="{10 + number * width:.1f}" y="{170 - height:.1f}" width="{width * 0.85:.1f}" '
            f'height="{height:.1f}" fill="{_colour(0)}"><title>layer {layer}: {value:.2f} dB</title></rect>'
        )
    bars.append(f'<text x="10" y="186">layers {min(worst)} to {max(worst)}; the highest bar is {highest:.1f} dB</text>')
    return _svg(bars, 820, 192)


def _verification(report: Mapping[str, Any] | None) -> str:
    if report is None:
        return "<p>Not run yet: <code>dist-export verify CHECKPOINT OUTPUT --json</code></p>"
    faults = report.get("faults") or []
    verdict = '<p class="ok">All levels passed.</p>' if not faults else f'<p class="bad">{len(faults)} faults.</p>'
    lines = "".join(f"<li>{escape(_fault(fault))}</li>" for fault in faults[:MOST_ROWS])
    facts = [(name, value) for name, value in report.items() if isinstance(value, str | int | float | bool)]
    return f"{verdict}<ul>{lines}</ul>{_table(facts)}"


def _fault(fault: object) -> str:
    return ": ".join(map(str, fault.values())) if isinstance(fault, Mapping) else str(fault)


def _provenance(manifest: Mapping[str, Any]) -> str:
    source = manifest["source"]
    rows: list[tuple[object, object]] = [
        ("checkpoint", source["folder"]),
        ("format", source["format"]),
        ("iteration", source["iteration"]),
        *((f"left out: {reason}", f"{count} elements") for reason, count in source["elements_left_out"].items()),
        ("made by", f"{manifest['producer']['name']} {manifest['producer']['version']}"),
        *((f"SHA-256 of {name}", value) for name, value in manifest["fingerprint"].items() if name != "version"),
        ("asked for", json.dumps(manifest["request"])),
    ]
    return _table(rows)


COMMANDS = {
    "trtllm": (
        "trtllm-build --checkpoint_dir {folder} --output_dir ENGINES",
        "trtllm-serve ENGINES --tokenizer TOKENIZER",
    ),
    "hf": (
        "vllm serve {folder}",
        "python -m sglang.launch_server --model-path {folder}",
        "trtllm-serve {folder} --backend pytorch",
    ),
}
"""Target -> how its runtimes are started."""


def _commands(target: str, folder: str) -> str:
    lines = "\n".join(command.format(folder=folder) for command in COMMANDS[target])
    return f"<pre>{escape(lines)}</pre>"


_COLOURS = ("#3b6fb6", "#d98032", "#4a9b5c", "#a14f9f", "#b0a12c", "#5aa7a7", "#8a6d5b", "#7a7a7a")


def _colour(number: int) -> str:
    return _COLOURS[number % len(_COLOURS)]


def _legend(names: Sequence[str]) -> list[str]:
    parts, x = [], 90
    for number, name in enumerate(names):
        parts.append(f'<rect x="{x}" y="6" width="12" height="12" fill="{_colour(number)}"/>')
        parts.append(f'<text x="{x + 17}" y="16">{escape(name)}</text>')
        x += 30 + 8 * len(name)
    return parts


def _svg(parts: Sequence[str], width: int, height: int) -> str:
    return f'<svg viewBox="0 0 {width} {height}" width="100%" role="img">{"".join(parts)}</svg>'
