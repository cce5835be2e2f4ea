"""``export_report.html``: what an export is, in one page that needs nothing but a browser.

Every figure comes from the manifest (and the reports beside it), so page and manifest cannot disagree. Text from the
checkpoint is escaped; the page has no script and loads nothing.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from dist_export.errors import ExportError
from dist_export.runtime.progress import format_bytes
from dist_export.targets.registry import target_named

NAME = "export_report.html"
MANIFEST, QUANTIZATION = "export_manifest.json", "quantization_report.json"
MOST_ROWS = 64
"""Ranks or files shown one by one; of more the first are shown and the others counted."""

STYLE = """
body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:60rem;padding:0 1rem;color:#1a1a1a;background:#fff}
h1{font-size:1.6rem;margin-bottom:.5rem}h2{font-size:1.15rem;margin-top:2rem;border-bottom:1px solid #8886}
.wide{overflow-x:auto}table{border-collapse:collapse;width:100%}
td,th{padding:.2rem .6rem;text-align:left;vertical-align:top}
td+td,.figures td:first-child{overflow-wrap:anywhere}tr:nth-child(even){background:#8881}
.figures .n{text-align:right;font-variant-numeric:tabular-nums;overflow-wrap:normal}td.n{white-space:nowrap}
code,pre{font:13px/1.5 ui-monospace,monospace;background:#8882}pre{padding:.6rem;overflow-x:auto}
.ok{color:#0a6b2d}.bad{color:#a30000}.todo{color:#8a5a00}.note{background:#fff7dc;padding:.3rem .6rem;margin:.3rem 0}
.verdict{font-weight:600;font-size:1.1rem;margin:.3rem 0}summary{cursor:pointer;margin:.4rem 0}
.bars{margin-bottom:.8rem}.bar{margin:.2rem 0;white-space:nowrap;display:grid;grid-template-columns:6rem 1fr 6rem}
.bar{gap:.6rem;align-items:center;font-variant-numeric:tabular-nums}
.bar>span{display:flex;height:1.1rem}.bar i,.key i{display:inline-block}.bar i{height:100%}
.key{margin-right:1rem;white-space:nowrap}.key i{width:.8rem;height:.8rem;margin-right:.3rem}
svg{min-width:46rem;width:100%}svg text{font:12px system-ui,sans-serif;fill:currentColor}
svg line{stroke:currentColor;opacity:.2}
@media(max-width:40rem){body{margin-top:1rem}td,th{padding:.2rem .3rem}.bar{grid-template-columns:5rem 1fr 5rem}}
@media(prefers-color-scheme:dark){body{color:#e6e6e6;background:#161616}.note{background:#3a3312}
.ok{color:#5fd38a}.bad{color:#ff8a80}.todo{color:#e8b65a}}
"""
_COLOURS = ("#3b6fb6", "#d98032", "#4a9b5c", "#a14f9f", "#b0a12c", "#5aa7a7", "#8a6d5b", "#7a7a7a")
Parts = Mapping[str, tuple[float, str]]
"""Name of a part of a bar -> its length and what to say of it."""


def render(
    manifest: Mapping[str, Any],
    *,
    quantization: Mapping[str, Any] | None = None,
    verification: Mapping[str, Any] | None = None,
    folder: str = "OUTPUT",
) -> str:
    """The page of one export. `verification` is what ``dist-export verify --json`` printed, where it was run."""
    target, processes = manifest["target"], manifest["run"]["processes"]
    known = target_named(target["name"])
    title = f"{target['architecture']} for {known.runtimes if known else target['name']}"
    sections = [
        f"<h1>{escape(title)}</h1>",
        _verdict(manifest, verification, folder),
        _table(_summary(manifest, quantization)),
        *(f'<p class="note">{escape(note)}</p>' for note in manifest["notes"]),
        _section("Serve it", _commands(command.format(output=shlex.quote(folder)) for command in manifest["serve"])),
        _section("Verification", _verification(verification)) if verification else "",
        _section("Quantisation", _quantization(quantization)) if quantization else "",
        _section("Where the time went", _times(processes)),
        _section("Memory and bytes per process", _memory(processes)),
        _section("Files", _files(manifest["files"])),
        _section("Model", _model(manifest["model"])),
        _section("Where it comes from", _provenance(manifest)),
    ]
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}: export report</title>'
        f'<meta name="viewport" content="width=device-width"><meta name="color-scheme" content="light dark">'
        f"<style>{STYLE}</style></head><body>{''.join(sections)}</body></html>\n"
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


def _verdict(manifest: Mapping[str, Any], report: Mapping[str, Any] | None, folder: str) -> str:
    """Whether the export may be used, in one line at the top."""
    if report is None:
        checkpoint = shlex.quote(str(manifest["source"]["folder"]))
        command = f"dist-export verify {checkpoint} {shlex.quote(folder)}"
        return f'<p class="verdict todo">Not verified yet.</p>{_commands([command])}'
    if report.get("faults"):
        faults = _counted(len(report["faults"]), "fault")
        return f'<p class="verdict bad">Verification failed: {faults}. Do not serve this.</p>'
    return f'<p class="verdict ok">Verified: {escape(", ".join(report["levels"]))}.</p>'


def _summary(manifest: Mapping[str, Any], quantization: Mapping[str, Any] | None) -> list[tuple[object, object]]:
    target, source, run = manifest["target"], manifest["source"], manifest["run"]
    trained = " ".join(f"{axis}{size}" for axis, size in source["training_layout"].items()) or "not said"
    written = sum(file["num_bytes"] for file in manifest["files"].values())
    longest = max((sum(each["seconds"].values()) for each in run["processes"]), default=0.0)
    peak = max((each["peak_memory"] for each in run["processes"]), default=0)
    return [
        ("checkpoint", f"{source['folder']}, iteration {source['iteration']}, trained as {trained}"),
        ("family", target["family"]),
        *((name, target[name]) for name in target if name not in ("name", "architecture", "family", "plan_digest")),
        ("quantised", _scheme(quantization) if quantization else "no"),
        ("size", f"{format_bytes(written)} in {_counted(len(manifest['files']), 'file')}"),
        ("run", f"{longest:.1f} s in {_counted(len(run['processes']), 'process')} of at most {format_bytes(peak)}"),
        ("finished", f"{run['finished']} on {run['host']}, by dist_export {manifest['producer']['version']}"),
    ]


def _counted(number: int, what: str) -> str:
    plural = "es" if what.endswith("s") else "s"
    return f"{number} {what}{'' if number == 1 else plural}"


def _scheme(report: Mapping[str, Any]) -> str:
    linears = ", ".join(f"{count} linears {scheme}" for scheme, count in report.get("linears", {}).items())
    cache = f"; KV cache {report['kv_cache']}" if report.get("kv_cache") else ""
    return f"{report['scheme']} ({linears}){cache}" if linears else f"{report['scheme']}{cache}"


def _section(title: str, body: str) -> str:
    return f"<h2>{escape(title)}</h2>{body}"


def _details(title: str, body: str) -> str:
    return f"<details><summary>{escape(title)}</summary>{body}</details>"


def _table(rows: Iterable[Sequence[object]], head: Sequence[str] = ()) -> str:
    """With a head, columns behind the first hold figures."""
    top = "".join(f"<th{_numeric(i)}>{escape(name)}</th>" for i, name in enumerate(head))
    lines = [f"<tr>{top}</tr>"] if head else []
    for row in rows:
        cells = (f"<td{_numeric(i) if head else ''}>{escape(str(cell))}</td>" for i, cell in enumerate(row))
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return f'<div class="wide"><table{" class=figures" if head else ""}>{"".join(lines)}</table></div>'


def _numeric(column: int) -> str:
    return ' class="n"' if column else ""


def _commands(commands: Iterable[str]) -> str:
    return f"<pre>{escape(chr(10).join(commands))}</pre>"


def _model(model: Mapping[str, Any]) -> str:
    """The fields that say something; those that are off are a click away."""
    rows = [(name, field["value"], field["from"]) for name, field in model.items()]
    off = [row for row in rows if row[1] in (None, False, 0, [], {})]
    return _table(row for row in rows if row not in off) + _details(f"{len(off)} fields that are off", _table(off))


def _files(files: Mapping[str, Any]) -> str:
    rows = [(name, len(file["tensors"]), format_bytes(file["num_bytes"])) for name, file in files.items()]
    return _table(rows[:MOST_ROWS], ("file", "tensors", "size")) + _more(rows)


def _more(rows: Sequence[object]) -> str:
    return f"<p>and {len(rows) - MOST_ROWS} more</p>" if len(rows) > MOST_ROWS else ""


def _times(processes: Sequence[Mapping[str, Any]]) -> str:
    """A bar per process, a colour per phase; the legend says how long each took where it took longest."""
    phases = dict.fromkeys(phase for each in processes for phase in each["seconds"])
    most = {phase: max(each["seconds"].get(phase, 0.0) for each in processes) for phase in phases}
    bars: list[tuple[str, Parts, str]] = [
        (
            f"process {each['rank']}",
            {phase: (seconds, f"{seconds:.3f} s") for phase, seconds in each["seconds"].items()},
            f"{sum(each['seconds'].values()):.2f} s",
        )
        for each in processes
    ]
    return _bars(bars, {phase: f"{phase} {seconds:.2f} s" for phase, seconds in most.items()})


def _memory(processes: Sequence[Mapping[str, Any]]) -> str:
    """A bar per process: the interpreter and its libraries, and what the work added; then the bytes as figures."""
    bars: list[tuple[str, Parts, str]] = []
    for each in processes:
        start, peak = each["memory_at_start"], each["peak_memory"]
        parts = {"start": (min(start, peak), format_bytes(start)), "work": (max(peak - start, 0), "")}
        bars.append((f"process {each['rank']}", parts, format_bytes(peak)))
    keys = ("bytes_needed", "bytes_read", "bytes_read_from_disk", "bytes_written", "peak_memory")
    rows = [(each["rank"], *(format_bytes(each[key]) for key in keys)) for each in processes[:MOST_ROWS]]
    head = ("process", "needed", "read", "from disk", "written", "peak memory")
    return _bars(bars, {"start": "at the start", "work": "added by the work"}) + _table(rows, head)


def _bars(bars: Sequence[tuple[str, Parts, str]], legend: Mapping[str, str]) -> str:
    """Stacked bars of one scale: (name, parts, total) each."""
    longest = max((sum(length for length, _ in parts.values()) for _, parts, _ in bars), default=0.0) or 1.0
    colours = {name: _COLOURS[number % len(_COLOURS)] for number, name in enumerate(legend)}
    lines = [_legend({text: colours[name] for name, text in legend.items()})]
    for name, parts, total in bars[:MOST_ROWS]:
        pieces = "".join(
            f'<i style="width:{100 * length / longest:.2f}%;background:{colours[part]}" '
            f'title="{escape(legend[part] if not text else f"{part}: {text}")}"></i>'
            for part, (length, text) in parts.items()
        )
        ends = f"<strong>{escape(name)}</strong>", f"<span>{escape(total)}</span>"
        lines.append(f'<div class="bar">{ends[0]}<span>{pieces}</span>{ends[1]}</div>')
    return f'<div class="bars">{"".join(lines)}</div>{_more(bars)}'


def _legend(colours: Mapping[str, str]) -> str:
    keys = (f'<span class="key"><i style="background:{c}"></i>{escape(text)}</span>' for text, c in colours.items())
    return f"<p>{' '.join(keys)}</p>"


def _quantization(report: Mapping[str, Any]) -> str:
    """Signal-to-noise by layer and kind of linear as a picture, the worst tensors as a table."""
    tensors = {name: each for name, each in report["tensors"].items() if each.get("snr_db") is not None}
    worst = sorted(tensors.items(), key=lambda item: item[1]["snr_db"])[:10]
    rows = [(name, f"{each['snr_db']:.2f}", f"{100 * each['saturated']:.4f} %") for name, each in worst]
    facts = [("scheme", _scheme(report)), *((key, report[key]) for key in ("origin", "measured") if key in report)]
    unmeasured = len(report["tensors"]) - len(tensors)
    if unmeasured:
        facts.append(("not measured", f"{unmeasured} tensors, which this run took over or did not encode"))
    table = _table(rows, ("the noisiest", "signal to noise, dB", "saturated")) if rows else ""
    return f"{_table(facts)}{_scatter(_by_layer(tensors))}{table}"


def _by_layer(tensors: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[int, float]]:
    """Kind of linear -> layer -> least signal to noise in dB, over ranks and experts."""
    kinds: dict[str, dict[int, float]] = {}
    for name, each in tensors.items():
        parts = name.rpartition(" ")[2].split(".")
        layer = next((int(part) for part in parts if part.isdigit()), -1)
        words = [part for part in parts if not part.isdigit() and not part.startswith("weight")]
        found = kinds.setdefault(".".join(words[-2:]), {})
        found[layer] = min(found.get(layer, math.inf), float(each["snr_db"]))
    return kinds


def _scatter(kinds: Mapping[str, Mapping[int, float]]) -> str:
    """A dot per layer and kind, on an axis that begins near the worst."""
    values = [value for each in kinds.values() for value in each.values()]
    if not values:
        return ""
    low, high = math.floor(min(values) - 0.5), math.ceil(max(values) + 0.5)
    last = max(max(layer for layer in each) for each in kinds.values())
    colours = {kind: _COLOURS[number % len(_COLOURS)] for number, kind in enumerate(kinds)}
    parts: list[str] = ['<text x="0" y="14">signal to noise, dB, the least of each layer (higher is better)</text>']
    for step in range(5):
        line, label = 230 - 50 * step, low + (high - low) * step / 4
        parts.append(f'<line x1="44" x2="810" y1="{line}" y2="{line}"/><text x="0" y="{line + 4}">{label:.1f}</text>')
    for number, (kind, layers) in enumerate(kinds.items()):
        apart = min(8.0, 600 / ((last + 1) * len(kinds))) if last >= 0 else 8.0
        aside = apart * (number - (len(kinds) - 1) / 2)  # dots of one layer side by side
        for layer, value in layers.items():
            x, y = 70 + 710 * max(layer, 0) / max(last, 1) + aside, 230 - 200 * (value - low) / (high - low)
            what = f"layer {layer}, {kind}: {value:.2f} dB"
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colours[kind]}">{_tip(what)}</circle>')
    for layer in sorted({round(max(last, 0) * step / 8) for step in range(9)}):
        parts.append(f'<text x="{67 + 710 * layer / max(last, 1):.1f}" y="250">{layer}</text>')
    parts.append('<text x="780" y="268">layer</text>')
    picture = f'<svg viewBox="0 0 820 274" role="img" aria-label="noise by layer">{"".join(parts)}</svg>'
    return f'{_legend(colours)}<div class="wide">{picture}</div>'


def _tip(text: str) -> str:
    return f"<title>{escape(text)}</title>"


def _verification(report: Mapping[str, Any]) -> str:
    faults = report.get("faults") or []
    failed = f'<p class="bad">{_counted(len(faults), "fault")}.</p>'
    verdict = failed if faults else '<p class="ok">All levels passed.</p>'
    lines = "".join(f"<li>{escape(_fault(fault))}</li>" for fault in faults[:MOST_ROWS])
    rows: list[tuple[object, object]] = [("levels", ", ".join(report.get("levels", ())))]
    rows += [("tensors", report["num_tensors"])] if "num_tensors" in report else []
    for key, name in (("num_bytes_checked", "checksummed"), ("num_bytes_compared", "compared with the checkpoint")):
        rows += [(name, f"{format_bytes(report[key])} ({report[key]} bytes)")] if key in report else []
    rows += [("note", warning) for warning in report.get("warnings", ())]
    rows += [(f"SHA-256 of {name}", value) for name, value in report.get("sha256", {}).items()]
    return f"{verdict}<ul>{lines}</ul>{_more(faults)}{_table(rows)}"


def _fault(fault: object) -> str:
    return ": ".join(str(each) for each in fault.values() if each) if isinstance(fault, Mapping) else str(fault)


def _provenance(manifest: Mapping[str, Any]) -> str:
    source = manifest["source"]
    rows: list[tuple[object, object]] = [
        ("checkpoint", source["folder"]),
        ("format", source["format"]),
        ("iteration", source["iteration"]),
        *((f"not read: {reason}", format_bytes(what["num_bytes"])) for reason, what in source["ignored"].items()),
        *((f"left out: {reason}", f"{count} elements") for reason, count in source["elements_left_out"].items()),
        ("made by", f"{manifest['producer']['name']} {manifest['producer']['version']}"),
        *((f"SHA-256 of {name}", value) for name, value in manifest["fingerprint"].items() if name != "version"),
        ("SHA-256 of plan", manifest["target"]["plan_digest"]),
        *((f"copied: {name}", path) for name, path in manifest["copied"].items()),
    ]
    asked = f"<pre>{escape(json.dumps(manifest['request'], indent=1))}</pre>"
    return _table(rows) + _details("everything that was asked for", asked)
