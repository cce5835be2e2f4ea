"""Scales in an export against those recomputed, and which tensors a quantised weight must have beside it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt
from msgspec import Struct

from dist_export.checkpoint.quantizer_names import ModuleName
from dist_export.errors import ExportError
from dist_export.plan.work import OutputTensor
from dist_export.tensors.dtypes import FLOAT8_E4M3, INT8, INT32, INT64, UINT8, DType
from dist_export.verify.findings import COVERAGE, REBUILD, Finding
from dist_export.verify.merging import Float32, rounded, to_float32
from dist_export.verify.output import Block, OutputReader, Region, TensorId
from dist_export.verify.quantized import QuantisedOutput
from dist_export.verify.quantized_formulas import Form, Grain, e4m3, e4m3_values
from dist_export.verify.quantized_mistakes import explain_scales
from dist_export.verify.quantized_names import Cells, Kind, Quantised
from dist_export.verify.quantizer_scales import not_used

MOST_NAMED = 4  # tensors of quantisers that a line names


class ScaleComparison(Struct, frozen=True):
    """Compares the scales of an output. Called on every rank, each with tensors of its own."""

    quantised: QuantisedOutput
    reader: OutputReader

    def keys(self, readable: Iterable[int], rank: int, world_size: int) -> list[TensorId]:
        """One rank's tensors."""
        files = frozenset(readable)
        every = [key for key, _, _ in self._companions()] + list(self.quantised.kv_caches)
        return sorted(key for key in every if key[0] in files)[rank::world_size]

    def _companions(self) -> Iterator[tuple[TensorId, Quantised, Kind]]:
        """Those that follow from quantisers alone; FP4's block scales follow from the weights."""
        for weight in self.quantised.weights.values():
            form = self.quantised.form(weight)
            for kind, tensor in weight.companions.items():
                from_weights = form is not None and form.grain is Grain.FP4 and kind is Kind.SCALE
                if form is not None and (not from_weights or self.quantised.is_stored(weight)):
                    yield (tensor.file, tensor.index), weight, kind

    def compare(self, keys: Iterable[TensorId]) -> tuple[list[Finding], int]:
        """(what is wrong, bytes compared)."""
        wanted, num_bytes = frozenset(keys), 0
        findings: list[Finding] = []
        for key, weight, kind in self._companions():
            if key in wanted:
                num_bytes += weight.companions[kind].planned.num_bytes
                findings += self._compare(weight, kind)
        for key, (kind, layer) in self.quantised.kv_caches.items():
            if key in wanted:
                num_bytes += self.quantised.output.tensors[key].planned.num_bytes
                findings += self._compare_kv(key, kind, layer)
        return findings, num_bytes

    def _compare(self, weight: Quantised, kind: Kind) -> Iterator[Finding]:
        tensor, num_different, first, done = weight.companions[kind], 0, "", set[Cells]()
        where, mistake = self.quantised.output.where((tensor.file, tensor.index)), ""
        try:
            for cells, values in self.quantised.companion_cells(weight, kind):
                expected = _stored(values, tensor)
                found = self._read(tensor, cells, kind)
                if cells not in done and (different := expected != found).any():
                    mistake = mistake or explain_scales(self.quantised, weight, kind, cells, _values(found, tensor))
                    first = first or _text(different, cells, expected, found, tensor)
                    num_different += int(different.sum())
                done.add(cells)
        except ExportError as error:
            yield Finding(REBUILD, where, f"cannot be recomputed: {error}")
            return
        total = math.prod(tensor.planned.shape)
        if num_different:
            text = f"{num_different} of {total} numbers of this {kind.value} differ, {first}"
            yield Finding(REBUILD, where, f"{mistake}; {text}" if mistake else text)
        covered = sum((c[1] - c[0]) * (c[3] - c[2]) for c in done)
        if covered != total:
            yield Finding(REBUILD, where, f"{total} numbers, of which the weights beside it account for {covered}")

    def _compare_kv(self, key: TensorId, kind: Kind, layer: int) -> Iterator[Finding]:
        tensor, clamped = self.quantised.output.tensors[key], self.quantised.output.plan.target == "trtllm"
        where = self.quantised.output.where(key)
        try:
            value = self.quantised.kv_scale(kind, layer, clamped=clamped)
        except ExportError as error:
            yield Finding(REBUILD, where, f"cannot be recomputed: {error}")
            return
        found = _values(self.reader.read_matrix(tensor, 1, Region((0, 1), (0, 1))), tensor)
        if found.view(np.uint32)[0, 0] != value.view(np.uint32):
            other = self.quantised.kv_scale(kind, layer, clamped=not clamped)
            hint = f"; it is {'not ' if clamped else ''}clamped to 1" if found[0, 0] == other else ""
            message = f"{kind.value} of layer {layer}: expected {value:.9g}, found {found[0, 0]:.9g}{hint}"
            yield Finding(REBUILD, where, message)

    def _read(self, tensor: OutputTensor, cells: Cells, kind: Kind) -> Block:
        shape = tensor.planned.shape
        form = self.quantised.form(self.quantised.owner(tensor))
        by_block = kind is Kind.SCALE and form is not None and form.grain in (Grain.BLOCK, Grain.FP4)
        width = shape[-1] if kind is Kind.FACTOR or by_block else 1
        last = math.prod(shape) // width
        if cells[1] > last or cells[3] > width:
            raise ExportError(f"has shape {list(shape)}, in which there is no place for rows up to {cells[1]}")
        return self.reader.read_matrix(tensor, width, Region(cells[:2], cells[2:]))


def _values(raw: Block, tensor: OutputTensor) -> Float32:
    if tensor.planned.dtype is INT64:
        return raw.view(np.int64).astype(np.float32)
    return e4m3_values(raw) if tensor.planned.dtype is FLOAT8_E4M3 else to_float32(raw, tensor.planned.dtype)


def _stored(values: Float32, tensor: OutputTensor) -> Block:
    values = np.ascontiguousarray(values)
    if tensor.planned.dtype is INT64:
        return values.astype(np.int64).view(np.uint64)
    return e4m3(values) if tensor.planned.dtype is FLOAT8_E4M3 else rounded(values, tensor.planned.dtype)


def _text(different: npt.NDArray[np.bool_], cells: Cells, expected: Block, found: Block, tensor: OutputTensor) -> str:
    row, column = divmod(int(different.argmax()), different.shape[1])
    place = f"row {cells[0] + row}, column {cells[2] + column}"
    right, wrong = _values(expected, tensor)[row, column], _values(found, tensor)[row, column]
    return f"the first at {place}: expected {right:.9g}, found {wrong:.9g}"


def check_scales(quantised: QuantisedOutput) -> tuple[list[Finding], list[str]]:
    """Without data: (faults, notes). Every quantised weight has the tensors that its scheme needs, of the right form,
    and every quantiser tensor of the checkpoint is used or named."""
    faults, notes = list(_weight_faults(quantised)), []
    left = not_used(quantised.scales, quantised.scales.used())
    for reason, names in sorted(left.items()):
        listed = ", ".join(names[:MOST_NAMED]) + (", …" if len(names) > MOST_NAMED else "")
        if reason:
            notes.append(f"left out: {len(names)} quantiser tensors {reason} ({listed})")
        else:
            message = f"{len(names)} quantiser tensors of quantised linears are not used: {listed}"
            faults.append(Finding(COVERAGE, "plan", message))
    unknown = [quantised.output.where(key) for key in quantised.unknown]
    weights = quantised.weights.items()
    unknown += [quantised.output.where(key) for key, weight in weights if not _is_known(quantised, weight)]
    if unknown:
        listed = ", ".join(unknown[:MOST_NAMED]) + (", …" if len(unknown) > MOST_NAMED else "")
        notes.append(f"{len(unknown)} tensors were not recomputed, only their checksums tell of them: {listed}")
    return faults, notes


def _is_known(quantised: QuantisedOutput, weight: Quantised) -> bool:
    return weight.output.planned.recipe is None or quantised.form(weight) is not None


def _weight_faults(quantised: QuantisedOutput) -> Iterator[Finding]:
    folded = quantised.folded
    for key, weight in quantised.weights.items():
        form, where = quantised.form(weight), quantised.output.where(key)
        forms = {quantised.scales.form(module) for module in weight.modules()}
        if weight.output.planned.recipe is None:
            kept = all(quantised.scales.has_factor(module) for module in weight.modules())
            if forms != {None} and not kept and not quantised.is_stored(weight):
                yield Finding(COVERAGE, where, f"is not quantised, although {weight.modules()[0]} is")
        if form is not None:
            yield from (Finding(COVERAGE, where, fault) for fault in _form_faults(quantised, weight, form, folded))


def _form_faults(quantised: QuantisedOutput, weight: Quantised, form: Form, folded: set[ModuleName]) -> Iterator[str]:
    taken = quantised.taken
    planned, dtypes = weight.output.planned, _dtypes(form)
    rows, columns = planned.view.shape[-2] // form.rows_per_byte, planned.view.shape[-1]
    if quantised.is_stored(weight):
        columns *= 2 if form.grain in (Grain.BLOCK, Grain.FP4) else 1
    columns //= 8 if form.words else form.columns_per_byte
    if planned.dtype not in dtypes or planned.shape != (*planned.view.shape[:-2], rows, columns):
        yield f"is {planned.dtype} {list(planned.shape)}, which does not hold its codes"
    needed = {Kind.SCALE}
    needed |= {Kind.SECOND} if form.second else set()
    needed |= {Kind.INPUT} if form.inputs else set()
    needed |= {Kind.SHAPE} if form.words else set()
    factors = [quantised.scales.has_factor(module) for module in weight.modules()]
    takes_over = [module in folded or module in taken for module in weight.modules()]
    if all(factors) and not any(takes_over):
        needed.add(Kind.FACTOR)
    for kind in sorted(needed - weight.companions.keys(), key=lambda each: each.value):
        yield f"lacks the {kind.value}"
    if Kind.FACTOR in weight.companions and any(takes_over):
        yield "has a factor of its activations that what is before it has taken over already"


def _dtypes(form: Form) -> tuple[DType, ...]:
    """Element types that hold the codes of a form."""
    if form.rows_per_byte == 2 or form.words:
        return (INT32,) if form.words else (INT8, UINT8)
    if form.columns_per_byte == 2:
        return (UINT8,)
    return (INT8,) if form.divisor == 127.0 else (FLOAT8_E4M3,)
