"""Levels two and three: every element accounted for by the inverse rules, and every byte compared.

Ranks share the source slabs; differences meet on rank 0, which says what is wrong with each tensor.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from msgspec import Struct, field, to_builtins
from msgspec.structs import replace

from dist_export.convert.sources import SourceFiles
from dist_export.errors import ExportError
from dist_export.plan.export import validate
from dist_export.plan.work import OutputTensor, Use, flat_rectangle, flat_shape
from dist_export.tensors.boxes import Box, Shape, partition_faults
from dist_export.tensors.views import Slab
from dist_export.verify.absorbed import Products
from dist_export.verify.compare import Comparer, Difference, choose_converter
from dist_export.verify.diagnose import Suspect, explain
from dist_export.verify.findings import COVERAGE, REBUILD, Finding
from dist_export.verify.inverse import PADDING, InverseRules, RebuiltSource, SourceOrigin
from dist_export.verify.output import OutputReader, Region, TensorId
from dist_export.verify.quantized import QuantisedOutput
from dist_export.verify.quantized_mistakes import explain_codes, one_flipped_bit
from dist_export.verify.quantized_scales import ScaleComparison
from dist_export.verify.source_reader import SourceReader

ZEROS = Slab("")
"""Stands for the source of elements that must be zero."""
MOST_EXPLAINED = 40  # tensors whose mistake is looked for; trying every layer of a large model takes a while
ZERO_BAND_BYTES = 1 << 20


class Coverage(Struct, frozen=True):
    """What the inverse rules account for."""

    faults: list[Finding]
    left_out: dict[str, int]


def check_coverage(inverse: InverseRules, recorded: Mapping[str, int]) -> Coverage:
    """Prove without data that every source element comes back and every target element has one origin.

    `recorded` is what the manifest says was left out of the source.
    """
    faults: list[Finding] = []
    boxes: dict[TensorId, set[Box]] = defaultdict(set)
    left_out: dict[str, int] = defaultdict(int)
    seen = set[Slab]()
    try:
        validate(inverse.output.plan)
    except ExportError as error:
        faults.append(Finding(COVERAGE, "plan", str(error)))
    for origin in inverse.origins():
        seen.add(origin.tensor.slab)
        try:
            rebuilt = inverse.rebuild(origin)
        except ExportError as error:
            faults.append(Finding(COVERAGE, "plan", str(error)))
            continue
        if rebuilt.left_out:
            left_out[PADDING] += rebuilt.left_out
        for use in rebuilt.work.uses:
            top, bottom, left, right = use.source
            boxes[use.output.file, use.output.index].add(
                Box((use.row, use.column), (bottom - top, right - left))
            )
    for slab in inverse.catalog.slabs():
        if slab not in seen:
            faults.append(Finding(COVERAGE, "plan", f"{slab}: no rule takes it"))
    faults += [*_target_faults(inverse, boxes), *Products(inverse).faults]
    if dict(recorded) != dict(left_out):
        message = f"records {dict(recorded)} elements left out, the rules leave out {dict(left_out)}"
        faults.append(Finding(COVERAGE, "export_manifest.json", message))
    return Coverage(faults, dict(left_out))


def _target_faults(inverse: InverseRules, boxes: Mapping[TensorId, set[Box]]) -> Iterator[Finding]:
    for key, output in inverse.output.tensors.items():
        if output.planned.is_small or (key not in boxes and output.planned.recipe is not None):
            continue  # scales: `dist_export.verify.quantized_coverage`; products: `dist_export.verify.absorbed`
        flat = flat_shape(output.planned.view.shape)
        zeros = [
            Box((r.rows[0], r.columns[0]), (r.rows[1] - r.rows[0], r.columns[1] - r.columns[0]))
            for r in zero_regions(output)
        ]
        for fault in partition_faults([*sorted(boxes.get(key, ()), key=_place), *zeros], flat):
            yield Finding(COVERAGE, inverse.output.where(key), fault)


def _place(box: Box) -> tuple[Shape, Shape]:
    return box.start, box.size  # the same order in every process, in which sets have their own


def zero_regions(output: OutputTensor) -> list[Region]:
    """Where the plan writes zeros: padding of the vocabulary, biases that the checkpoint lacks."""
    regions = []
    if output.planned.recipe is not None:
        return []
    for piece in output.planned.view.pieces:
        if piece.slab is None and piece.box.num_elements:
            top, bottom, left, right = flat_rectangle(piece.box, output.planned.view.shape)
            regions.append(Region((top, bottom), (left, right)))
    return regions


def rebuilt_sources(inverse: InverseRules) -> Iterator[RebuiltSource]:
    """Every source that comes back; the coverage level names the others."""
    for origin in inverse.origins():
        try:
            yield inverse.rebuild(origin)
        except ExportError:
            continue


def share_sources(inverse: InverseRules, rank: int, world_size: int) -> list[SourceOrigin]:
    """One rank's source slabs: largest first, each to the rank that has least so far."""
    origins = list(inverse.origins())
    if world_size == 1:
        return origins
    loads, kept = [0] * world_size, []
    sized = [(-_num_elements(origin), number) for number, origin in enumerate(origins)]
    for size, number in sorted(sized):
        target = loads.index(min(loads))
        loads[target] -= size
        if target == rank:
            kept.append(number)
    return [origins[number] for number in sorted(kept)]


def _num_elements(origin: SourceOrigin) -> int:
    return Box.whole(origin.tensor.shape).num_elements


class RankComparison(Struct):
    """What one rank found. Exchanged as JSON."""

    differences: list[Difference] = field(default_factory=list)
    num_bytes: int = 0
    """Output bytes compared."""
    findings: list[Finding] = field(default_factory=list)
    """What is wrong with scales."""

    def encode(self) -> bytes:
        """As bytes for another rank."""
        return json.dumps(to_builtins(self)).encode()

    @staticmethod
    def decode(data: bytes) -> RankComparison:
        """What `encode` made."""
        values = json.loads(data)
        findings = [Finding(**each) for each in values["findings"]]
        return RankComparison([_difference(each) for each in values["differences"]], values["num_bytes"], findings)


def _difference(values: dict[str, Any]) -> Difference:
    pairs = {name: tuple(values[name]) for name in ("tensor", "source", "target")}
    slab = Slab(values["slab"]["name"], tuple(values["slab"]["prefix"]))
    return Difference(**{**values, **pairs, "slab": slab})


class Rebuild(Struct, frozen=True):
    """Compares the output with the checkpoint through the inverse rules."""

    inverse: InverseRules
    sources: SourceFiles
    reader: OutputReader
    readable: frozenset[int]
    """Output files that are what the plan says; the others are left out of the comparison."""
    device: str = "cpu"
    quantised: QuantisedOutput | None = None

    def work(self, rank: int, world_size: int) -> list[RebuiltSource]:
        """One rank's sources. Parts in files that cannot be read, and sources that do not come back, are left out."""
        rebuilt = []
        for origin in share_sources(self.inverse, rank, world_size):
            try:
                source = self.inverse.rebuild(origin)
            except ExportError:
                continue  # the coverage level names it
            if self.quantised is not None:
                source = self.quantised.extended(source)
            uses = tuple(use for use in source.work.uses if use.output.file in self.readable and self._is_known(use))
            rebuilt.append(RebuiltSource(origin, replace(source.work, uses=uses), source.left_out))
        return rebuilt

    def _is_known(self, use: Use) -> bool:
        """Whether what the use fills can be made again; what cannot be is named by `check_scales`."""
        quantised, key = self.quantised, (use.output.file, use.output.index)
        return use.output.planned.recipe is None or (quantised is not None and quantised.knows(key))

    def compare(
        self, work: Sequence[RebuiltSource], zeros: Iterable[TensorId], *, progress: Callable[[int, int], None]
    ) -> RankComparison:
        """Compare one rank's sources, and the regions of `zeros` that must be zero."""
        uses = [use for source in work for use in source.work.uses]
        converter = choose_converter((use for use in uses if use.output.planned.recipe is None), device=self.device)
        comparer = Comparer(
            self.sources, self.reader, converter=converter, recomputer=self.quantised, progress=progress
        )
        differences = comparer.run([source.work for source in work])
        total = comparer.num_bytes_compared
        for key in zeros:
            output = self.inverse.output.tensors[key]
            for region in zero_regions(output):
                difference, count = self._compare_zeros(output, region)
                total += count
                differences += [difference] if difference else []
        return RankComparison(differences, total)

    def zeros(self, rank: int, world_size: int) -> list[TensorId]:
        """One rank's target tensors with elements that must be zero."""
        keys = [key for key, t in self.inverse.output.tensors.items() if t.file in self.readable and zero_regions(t)]
        return keys[rank::world_size]

    def _compare_zeros(self, output: OutputTensor, region: Region) -> tuple[Difference | None, int]:
        found, count = None, 0
        width = (region.columns[1] - region.columns[0]) * output.planned.dtype.itemsize
        step = max(ZERO_BAND_BYTES // max(width, 1), 1)
        for first in range(region.rows[0], region.rows[1], step):
            rows = (first, min(first + step, region.rows[1]))
            block = self.reader.read(output, Region(rows, region.columns))
            count += block.nbytes
            if block.any():
                row, column = divmod(int((block != 0).argmax()), block.shape[1])
                place = (first + row, region.columns[0] + column)
                value, number = int(block[row, column]), int((block != 0).sum())
                key = (output.file, output.index)
                here = Difference(key, ZEROS, number, block.size, place, place, 0, value)
                found = found.merged(here) if found else here
        return found, count

    def compare_scales(self, rank: int, world_size: int) -> tuple[list[Finding], int]:
        """One rank's scales: (what is wrong, bytes compared)."""
        if self.quantised is None:
            return [], 0
        comparison = ScaleComparison(self.quantised, self.reader)
        return comparison.compare(comparison.keys(self.readable, rank, world_size))

    def compare_products(self, rank: int, world_size: int) -> tuple[list[Finding], int]:
        """One rank's products of weights, which no inverse rule rebuilds: (what is wrong, bytes compared)."""
        products, findings, total = Products(self.inverse), list[Finding](), 0
        readable = [product for product in products.found if product.output.file in self.readable]
        for product in readable[rank::world_size]:
            found, num_bytes = products.compare(product, SourceReader(self.sources), self.reader)
            findings += found
            total += num_bytes
        return findings, total

    def findings(self, comparisons: Iterable[RankComparison]) -> list[Finding]:
        """One finding per target tensor that differs, saying where and what is wrong. Called on one rank."""
        by_tensor: dict[TensorId, list[Difference]] = defaultdict(list)
        scales: list[Finding] = []
        for comparison in comparisons:
            scales += comparison.findings
            for difference in comparison.differences:
                by_tensor[difference.tensor].append(difference)
        origins = {origin.tensor.slab: origin for origin in self.inverse.origins()} if by_tensor else {}
        findings = []
        for number, (key, differences) in enumerate(sorted(by_tensor.items())):
            mistake = self._mistake(key, differences, origins) if number < MOST_EXPLAINED else ""
            findings.append(Finding(REBUILD, self.inverse.output.where(key), self._text(differences, origins, mistake)))
        return findings + sorted(scales, key=lambda each: each.where)

    def _mistake(
        self, key: TensorId, differences: Sequence[Difference], origins: Mapping[Slab, SourceOrigin]
    ) -> str:
        output = self.inverse.output.tensors[key]
        if output.planned.recipe is not None:
            return self._quantised_mistake(differences)
        made_by = self.inverse.rule_of(output)
        if made_by is None:
            return ""
        experts = {origins[each.slab].place.expert for each in differences if each.slab in origins}
        suspect = Suspect(self.inverse, output, *made_by, tuple(differences), tuple(sorted(experts)))
        return explain(suspect, self.sources, self.reader)

    def _quantised_mistake(self, differences: Sequence[Difference]) -> str:
        assert self.quantised is not None, "only known recipes are compared"
        flipped = one_flipped_bit(differences)
        first = min(differences, key=lambda each: each.target)
        return flipped or explain_codes(self.quantised, first, self.reader, SourceReader(self.sources))

    def _text(self, differences: Sequence[Difference], origins: Mapping[Slab, SourceOrigin], mistake: str) -> str:
        first = min(differences, key=lambda each: (each.slab == ZEROS, each.target))
        output = self.inverse.output.tensors[first.tensor]
        digits = 2 * output.planned.dtype.itemsize
        bits = f"expected 0x{first.expected:0{digits}x}, found 0x{first.found:0{digits}x}"
        different = sum(each.num_different for each in differences)
        total = output.planned.num_bytes // output.planned.dtype.itemsize
        row, column = first.target
        if first.slab == ZEROS:
            place = f"{different} of {total} elements should be zero, the first at row {row}, column {column}"
        else:
            origin = origins[first.slab]
            place = (
                f"{different} of {total} elements differ from {origin}, the first at "
                f"{self.inverse.logical_position(origin, *first.source)}, here row {row}, column {column}"
            )
        return (f"{mistake}; " if mistake else "") + f"{place}: {bits}"
