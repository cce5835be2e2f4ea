"""Verifying an output folder: the plan is made again from what the manifest records, then checked level by level."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from msgspec import Struct, field

from dist_export.api import OpenedModel, Source, TargetOptions, open_model, plan
from dist_export.checkpoint.open import TRACKER
from dist_export.convert.sources import SourceFiles
from dist_export.errors import ExportError
from dist_export.families.mapping import CodeMapping, ModelMapping, mapping_from
from dist_export.models.overrides import coerce_override
from dist_export.plan.export import ExportPlan
from dist_export.quantization import QuantizationOptions
from dist_export.runtime.group import Group
from dist_export.runtime.publication import check_no_refit
from dist_export.targets.registry import TARGETS, target_named
from dist_export.verify import checksums
from dist_export.verify.files import MANIFEST, FolderCheck, check_folder, read_manifest
from dist_export.verify.findings import CHECKSUMS, COVERAGE, LEVELS, PLAN, REBUILD, Finding, VerifyReport
from dist_export.verify.inverse import InverseRules
from dist_export.verify.output import OutputReader, PlannedOutput
from dist_export.verify.quantized import QuantisedOutput
from dist_export.verify.quantized_scales import check_scales
from dist_export.verify.quantizer_scales import QuantizerScales
from dist_export.verify.rebuild import RankComparison, Rebuild, check_coverage, rebuilt_sources
from dist_export.verify.source_reader import SourceReader

FROM_MANIFEST = "export manifest"


class VerifyOptions(Struct, frozen=True, kw_only=True):
    """How to verify."""

    levels: tuple[str, ...] = LEVELS
    sha256: bool = False
    num_threads: int = 2
    device: str = "cpu"
    """Torch device for much arithmetic."""
    code_allowed: bool = False
    """Whether an export that was made with a program for a mapping may run it again."""

    def __post_init__(self) -> None:
        unknown = [level for level in self.levels if level not in LEVELS]
        if unknown or not self.levels:
            raise ExportError(f"no such verification level: {', '.join(unknown)}; there are {', '.join(LEVELS)}")


def find_exports(output: Path) -> list[Path]:
    """The folders of an output that hold an export: itself, or those of several targets.

    Raises `ExportError` when there is none.
    """
    if not output.is_dir():
        raise ExportError(f"{output}: no such folder")
    check_no_refit(output)
    if (output / MANIFEST).is_file():
        return [output]
    found = sorted(path for path in output.iterdir() if path.is_dir() and (path / MANIFEST).is_file())
    if not found:
        raise ExportError(f"{output}: has no {MANIFEST}; it is not an export, or an unfinished one")
    return found


def source_from_manifest(
    checkpoint: Path, manifest: Mapping[str, Any], *, base: Path | None = None, code_allowed: bool = False
) -> Source:
    """The source as it was named for the export, at `checkpoint`: same iteration, overrides and family.

    The iteration is the recorded one even where training has saved later ones since. `base` is where the base model of
    adapters lies now, where that is not as recorded; `ExportError` when the export merged none.
    """
    request, recorded = manifest["request"], manifest["source"].get("iteration")
    iteration = request.get("iteration")
    if iteration is None and isinstance(recorded, int) and (checkpoint / f"iter_{recorded:07d}").is_dir():
        iteration = recorded
    given = request.get("overrides") or {}
    overrides = {name: (coerce_override(name, value), FROM_MANIFEST) for name, value in given.items()}
    has_iterations = (checkpoint / TRACKER).is_file() or (
        iteration is not None and (checkpoint / f"iter_{iteration:07d}").is_dir()
    )
    return Source(
        checkpoint=checkpoint,
        iteration=iteration if has_iterations else None,
        overrides=overrides,
        family=request.get("family"),
        base=_base(request.get("base"), base),
        master_weights=request.get("master_weights") is True,
        quantization=QuantizationOptions.from_plain(request.get("quantization") or {}),
        mapping=_mapping(request.get("mapping"), code_allowed=code_allowed),
        calibration=Path(request["calibration"]) if request.get("calibration") else None,
    )


def _mapping(recorded: object, *, code_allowed: bool) -> ModelMapping | CodeMapping | None:
    if isinstance(recorded, dict):
        return ModelMapping(recorded, MANIFEST)
    return mapping_from(Path(recorded), code_allowed=code_allowed) if isinstance(recorded, str) else None


def _base(recorded: object, given: Path | None) -> Path | None:
    if not isinstance(recorded, str):
        if given is not None:
            raise ExportError(f"--base {given}: the export was made without --base")
        return None
    return given or Path(recorded)


def plan_from_manifest(model: OpenedModel, manifest: Mapping[str, Any]) -> ExportPlan:
    """The plan of an export, made anew with the options its manifest records.

    Raises `ExportError` when the options are not those of a known target, or cannot be planned.
    """
    return plan(model, options_from_manifest(manifest), family=manifest["request"].get("family"))


def options_from_manifest(manifest: Mapping[str, Any]) -> TargetOptions:
    """What was chosen of the target; `ExportError` when it is not known."""
    request = manifest["request"]
    name, options = request.get("target"), request.get("options")
    target = target_named(name)
    if target is None or not isinstance(options, dict):
        known = ", ".join(each.name for each in TARGETS)
        raise ExportError(f"{MANIFEST}: request names no known target ({name!r}); known: {known}")
    try:
        chosen: TargetOptions = target.options.from_plain(options)
    except (TypeError, ValueError, AssertionError) as error:
        raise ExportError(f"{MANIFEST}: the options of {name} cannot be read: {error}") from error
    return chosen


def verify_export(
    checkpoint: Path,
    output: Path,
    *,
    options: VerifyOptions | None = None,
    group: Group | None = None,
    base: Path | None = None,
) -> VerifyReport:
    """Verify one output folder (`find_exports`) against the checkpoint it was made from. All ranks call it.

    Every rank returns the same report. What is wrong with the export is in the report; `ExportError` is raised when
    it cannot be verified at all: no manifest, a checkpoint that cannot be read.
    """
    manifest, chosen = read_manifest(output), options or VerifyOptions()
    model = open_model(source_from_manifest(checkpoint, manifest, base=base, code_allowed=chosen.code_allowed))
    made = plan_from_manifest(model, manifest)
    verification = Verification(model, made, manifest, output, chosen, group or Group.single())
    return verification.run()


class Verification(Struct):
    """One rank's part of verifying a folder against a plan."""

    model: OpenedModel
    plan: ExportPlan
    manifest: Mapping[str, Any]
    folder: Path
    options: VerifyOptions
    group: Group
    faults: list[Finding] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    left_out: dict[str, int] = field(default_factory=dict)
    sha256: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    num_bytes_checked: int = 0
    num_bytes_compared: int = 0

    def run(self) -> VerifyReport:
        """All levels asked for. All ranks call it."""
        output = PlannedOutput(self.plan)
        readable = self._check_folder()
        names = {number: name for number, name in output.file_names.items() if number in readable}
        with closing(SourceFiles(self.model.checkpoint.index)) as sources, OutputReader(self.folder, names) as reader:
            if CHECKSUMS in self.options.levels:
                with self._phase(CHECKSUMS):
                    self._checksums(output, reader, sorted(readable))
            if COVERAGE in self.options.levels and self.group.rank == 0:
                with self._phase(COVERAGE):
                    self._coverage(output, sources)
            if REBUILD in self.options.levels:
                with self._phase(REBUILD):
                    self._rebuild(output, reader, readable, sources)
        return self._report(output)

    def _step(self, name: str) -> str:
        """A step of the group: each folder has its own."""
        return f"verify {self.folder}: {name}"

    def _check_folder(self) -> frozenset[int]:
        """Rank 0 looks; every rank learns which files can be read."""
        message = None
        if self.group.rank == 0:
            self._check_source()
            check = check_folder(self.folder, self.manifest, self.plan)
            self._take(check)
            message = json.dumps(check.readable).encode()
        return frozenset(json.loads(self.group.broadcast(self._step("files"), message)))

    def _check_source(self) -> None:
        recorded, opened = self.manifest["source"].get("iteration"), self.model.checkpoint.iteration
        if recorded != opened:
            message = f"was made from iteration {recorded}, the checkpoint given is of iteration {opened}"
            self.faults.append(Finding(PLAN, MANIFEST, message))

    def _take(self, check: FolderCheck) -> None:
        self.faults += check.faults
        self.warnings += check.warnings

    def _checksums(self, output: PlannedOutput, reader: OutputReader, files: Sequence[int]) -> None:
        group = self.group
        segments = checksums.share(checksums.segments_of(output, files), group.rank, group.world_size)
        group.progress.add(total=sum(segment.end - segment.start for segment in segments))
        results = checksums.checksum_segments(
            segments, reader, num_threads=self.options.num_threads, progress=self._progress
        )
        gathered = group.gather(self._step("checksums"), checksums.encode(results))
        hashed = files[group.rank :: group.world_size] if self.options.sha256 else ()
        digests = dict(checksums.sha256_of(reader, hashed))
        whole = group.gather(self._step("sha256"), json.dumps(digests).encode())
        if gathered is None or whole is None:
            return
        sums = checksums.TensorSums()
        for data in gathered:
            sums.add(checksums.decode(data))
        self.num_bytes_checked = sum(each.run[1] for results in sums.by_tensor.values() for each in results)
        faults, warnings = checksums.checksum_findings(output, sums, self.manifest["files"])
        for data in whole:
            self.sha256 |= json.loads(data)
        self.sha256 = dict(sorted(self.sha256.items()))
        self.faults += [*faults, *checksums.sha256_findings(self.sha256, self.manifest["files"])]
        self.warnings += warnings

    def _coverage(self, output: PlannedOutput, sources: SourceFiles) -> None:
        if (quantised := self._quantised(output, sources)) is not None:
            faults, notes = check_scales(quantised)
            self.faults += faults
            self.warnings += notes
        recorded = self.manifest["source"].get("elements_left_out")
        coverage = check_coverage(InverseRules(output), recorded if isinstance(recorded, dict) else {})
        self.faults += coverage.faults
        self.left_out = coverage.left_out

    def _quantised(self, output: PlannedOutput, sources: SourceFiles) -> QuantisedOutput | None:
        """The quantised tensors of the plan; None when it has none."""
        quantization, inverse = self.plan.quantization, InverseRules(output)
        if quantization is None:
            return None
        scales = QuantizerScales(quantization, self.model.checkpoint.index, SourceReader(sources))
        return QuantisedOutput(output, scales, rebuilt_sources(inverse))

    def _measure(self, scales: QuantizerScales) -> None:
        """Amax of weights that no quantiser stores, each measured by one rank."""
        modules, group = scales.to_measure(), self.group
        values = np.zeros(len(modules), np.float32)
        mine = range(group.rank, len(modules), group.world_size)
        values[list(mine)] = scales.measure([modules[number] for number in mine])
        found = group.all_reduce_max(values, step=self._step("amax")) if modules else values
        scales.measured.update(zip(modules, found, strict=True))

    def _rebuild(
        self, output: PlannedOutput, reader: OutputReader, readable: frozenset[int], sources: SourceFiles
    ) -> None:
        group, quantised = self.group, self._quantised(output, sources)
        if quantised is not None:
            self._measure(quantised.scales)
        rebuild = Rebuild(InverseRules(output), sources, reader, readable, self.options.device, quantised)
        work = rebuild.work(group.rank, group.world_size)
        zeros = rebuild.zeros(group.rank, group.world_size)
        group.progress.add(total=sum(source.num_bytes for source in work))
        mine = rebuild.compare(work, zeros, progress=self._progress)
        for compare in (rebuild.compare_scales, rebuild.compare_products):
            found, num_bytes = compare(group.rank, group.world_size)
            mine.findings += found
            mine.num_bytes += num_bytes
        gathered = group.gather(self._step("differences"), mine.encode())
        if gathered is not None:
            comparisons = [RankComparison.decode(data) for data in gathered]
            self.num_bytes_compared = sum(each.num_bytes for each in comparisons)
            self.faults += rebuild.findings(comparisons)

    def _report(self, output: PlannedOutput) -> VerifyReport:
        """Rank 0's report, on every rank."""
        report = VerifyReport(
            output=str(self.folder),
            target=self.plan.target,
            levels=self.options.levels,
            faults=tuple(self.faults),
            warnings=tuple(self.warnings),
            num_tensors=len(output.tensors),
            num_bytes_checked=self.num_bytes_checked,
            num_bytes_compared=self.num_bytes_compared,
            elements_left_out=self.left_out,
            sha256=self.sha256,
            seconds=self.seconds,
        )
        sent = report.to_json().encode() if self.group.rank == 0 else None
        return VerifyReport.from_json(self.group.broadcast(self._step("report"), sent).decode())

    def _progress(self, num_bytes_read: int, num_bytes_done: int) -> None:
        self.group.progress.add(bytes_read=num_bytes_read, bytes_written=num_bytes_done)
        self.group.check()

    @contextmanager
    def _phase(self, level: str) -> Iterator[None]:
        begun = time.monotonic()
        yield
        self.seconds[level] = time.monotonic() - begun
