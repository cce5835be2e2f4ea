"""The scale table: every amax and activation scale that a run needs, found before the first quantised byte.

Values from the checkpoint are read, those of weights that nobody calibrated are measured; each process finds its share
and one MAX all-reduce gives all processes the same table, whatever their number.
"""

from __future__ import annotations

import json
from base64 import b64decode, b64encode
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from msgspec import Struct, field
from msgspec.structs import replace

from dist_export.checkpoint.quantizer_names import ModuleName, Quantity, Quantizer
from dist_export.checkpoint.quantizer_scheme import KvScheme, Scheme
from dist_export.convert.numpy_arithmetic import to_float32
from dist_export.convert.view_reader import ViewReader
from dist_export.errors import ExportError, Faults
from dist_export.models.quantization import PER_TENSOR, STATIC_INPUT, Quantization, kv_module, row_slab
from dist_export.models.source_tensor import SourceTensor
from dist_export.plan.quantize import FP8_MAX
from dist_export.tensors.dtypes import DType, dtype_by_name

Float32 = npt.NDArray[np.float32]
MEASURE_BYTES = 1 << 20
MOST_ROWS = 1 << 26
"""Rows of all weights together whose amax a table may hold, 256 MiB of float32 per process."""


class ScaleTable(Struct, frozen=True):
    """Amax of weights and of activations by module, float32."""

    weights: Mapping[ModuleName, np.float32]
    inputs: Mapping[ModuleName, np.float32]
    input_scales: Mapping[ModuleName, float]
    """Dequantisation scales of FP8 activations where training kept those; exact, so never turned into an amax."""
    weight_scales: Mapping[ModuleName, float] = field(default_factory=dict)
    """Dequantisation scales of weights that are stored quantised."""
    rows: Mapping[str, Float32] = field(default_factory=dict)
    """Measured amax of the rows of weights, by the name of `row_slab`."""

    def weight_scale(self, modules: Iterable[ModuleName], divisor: float) -> np.float32:
        """amax / divisor of the modules together. A weight of zeros has scale 1."""
        return _largest(modules, self.weights, self.weight_scales, divisor)

    def input_scale(self, modules: Iterable[ModuleName], divisor: float) -> np.float32:
        """amax / divisor of the modules' activations together."""
        known = list(modules)
        assert divisor == FP8_MAX or not any(each in self.input_scales for each in known), "training keeps FP8 scales"
        return _largest(known, self.inputs, self.input_scales, divisor)

    def encode(self) -> bytes:
        """As bytes for a file; `decode` gives the same table."""
        tables: tuple[Mapping[ModuleName, float], ...] = (
            {module: float(value) for module, value in self.weights.items()},
            {module: float(value) for module, value in self.inputs.items()},
            self.input_scales,
            self.weight_scales,
        )
        plain = [[[m.pattern, m.layer, m.expert, value] for m, value in each.items()] for each in tables]
        rows = {name: b64encode(values.astype("<f4").tobytes()).decode() for name, values in self.rows.items()}
        return json.dumps([*plain, rows]).encode()

    @staticmethod
    def decode(data: bytes) -> ScaleTable:
        """What `encode` made."""
        *plain, rows = json.loads(data)
        tables = [{ModuleName(*name): value for *name, value in each} for each in plain]
        weights, inputs = ({m: np.float32(value) for m, value in each.items()} for each in tables[:2])
        by_row = {name: np.frombuffer(b64decode(text), "<f4") for name, text in rows.items()}
        return ScaleTable(weights, inputs, tables[2], tables[3], by_row)


def _scale(amax: np.float32, divisor: float) -> np.float32:
    return _float32(amax / np.float32(divisor)) if amax > 0 else _float32(1.0)


Amax = Mapping[ModuleName, np.float32]
Exact = Mapping[ModuleName, float]


def _largest(modules: Iterable[ModuleName], amax: Amax, exact: Exact, divisor: float) -> np.float32:
    known = list(modules)
    scales = [_float32(exact[each]) for each in known if each in exact]
    found = [amax[each] for each in known if each not in exact]
    return max([*scales, _scale(max(found), divisor)] if found else scales)


def _float32(value: Any) -> np.float32:
    result: np.float32 = np.float32(value)
    return result


class Entry(Struct, frozen=True):
    """Numbers of the table to find: one that is stored, or what is measured on the module's weights."""

    module: ModuleName
    of_input: bool
    stored: SourceTensor | None
    measured: tuple[SourceTensor, ...] = ()
    """Where nothing is stored, or only the 0 of a weight that calibration never saw."""
    is_scale: bool = False
    """The stored number is no amax but what codes are multiplied by."""
    num_rows: int = 0
    """More than 0: the amax of each row of the one measured weight."""

    @property
    def num_bytes(self) -> int:
        """Weight bytes to read for it."""
        return 0 if self.stored else sum(_num_bytes(each) for each in self.measured)

    @property
    def num_bytes_needed(self) -> int:
        """All source bytes to read for it."""
        return _num_bytes(self.stored) if self.stored else self.num_bytes

    @property
    def size(self) -> int:
        """How many numbers it is."""
        return self.num_rows or 1


def entries_of(quantization: Quantization) -> list[Entry]:
    """What has to be found, in the same order everywhere.

    Raises `ExportError` naming every activation without a scale, and for more rows than a table may hold.
    """
    faults, entries = Faults("activations without a scale"), []
    for module in quantization.modules():
        scheme = quantization.schemes[module]
        if scheme.scheme in PER_TENSOR:
            entries.append(_weight_entry(quantization, module))
        elif quantization.is_measured(module):
            parts = weights_of(quantization, module)
            entries += [Entry(module, False, None, (each,), num_rows=each.shape[0]) for each in parts]
        if scheme.scheme in STATIC_INPUT and module not in quantization.input_scales:
            stored = quantization.tensors.find(module, Quantizer.INPUT, Quantity.AMAX)
            if stored is not None:
                entries.append(Entry(module, True, stored))
            elif not _has_input(quantization, module):
                faults.add(f"{module}: {scheme.scheme.value} needs an amax of its input and there is none")
    if quantization.kv_cache is not KvScheme.NONE and quantization.kv_cache_scale is None:
        for layer in range(quantization.logical.config.num_layers):
            for part, tensor in zip(("key", "value"), quantization.kv_amax(layer), strict=True):
                if kv_module(layer, part) not in quantization.input_scales:
                    entries.append(Entry(kv_module(layer, part), True, tensor))
    faults.raise_if_any()
    if sum(each.num_rows for each in entries) > MOST_ROWS:
        raise ExportError(f"scales per row: the weights have more than {MOST_ROWS} rows together; calibrate the model")
    return entries


def _weight_entry(quantization: Quantization, module: ModuleName) -> Entry:
    scheme, find_tensor = quantization.schemes[module], quantization.tensors.find
    if scheme.compressed and scheme.scheme is Scheme.W4A8_AWQ:  # of its second quantiser an amax is kept
        stored = find_tensor(module, Quantizer.WEIGHT, Quantity.AMAX, 1)
        if stored is None:
            raise ExportError(
                f"{module}: its weight is stored quantised, but its second {Quantity.AMAX.value} is missing"
            )
        return Entry(module, False, stored)
    if scheme.compressed:
        quantity = Quantity.SCALE if scheme.scheme is Scheme.FP8 else Quantity.DOUBLE_SCALE
        stored = find_tensor(module, Quantizer.WEIGHT, quantity)
        if stored is None:
            raise ExportError(f"{module}: its weight is stored quantised, but its {quantity.value} is missing")
        return Entry(module, False, stored, is_scale=True)
    stored = find_tensor(module, Quantizer.WEIGHT, Quantity.AMAX, 1 if scheme.scheme is Scheme.W4A8_AWQ else None)
    return Entry(module, False, stored, weights_of(quantization, module))


def _has_input(quantization: Quantization, module: ModuleName) -> bool:
    """Whether another expert of the layer has an input scale, which then serves for this one."""
    return any(
        each in quantization.input_scales or quantization.tensors.find(each, Quantizer.INPUT, Quantity.AMAX)
        for each in quantization.experts_of(module)
        if each != module
    )


def weights_of(quantization: Quantization, module: ModuleName) -> tuple[SourceTensor, ...]:
    """The stored weight tensors of a module."""
    catalog = quantization.logical.catalog
    names = ("weight", "weight_w", "weight_v")
    found = [catalog.find(f"{module.pattern}.{n}", layer=module.layer, expert=module.expert) for n in names]
    return tuple(each for each in found if each is not None)


def share(entries: Sequence[Entry], rank: int, world_size: int) -> list[int]:
    """Numbers of the entries that one process reads: every one of which a value is stored has one process."""
    return [number for number, entry in enumerate(entries) if entry.stored][rank::world_size]


def find(entries: Sequence[Entry], numbers: Sequence[int], reader: ViewReader) -> Float32:
    """The stored values of the entries `numbers`, -inf for all others: float32, all entries' one after the other.

    Weights are measured here only where the stored amax is 0, of a weight that calibration never saw; those of which
    none is stored are left to `dist_export.convert.measuring`.
    """
    starts = np.cumsum([0, *(entry.size for entry in entries)])
    values = np.full(starts[-1], -np.inf, np.float32)
    for number in numbers:
        entry = entries[number]
        found = _read(entry, reader)
        is_missing = entry.measured and not found
        values[starts[number] : starts[number + 1]] = measure(entry, reader) if is_missing else found
    return values


def table_of(entries: Sequence[Entry], values: Float32, quantization: Quantization) -> ScaleTable:
    """The table, of values from all processes. `ExportError` naming every value that no scale can be made of."""
    faults, start = Faults("scales"), 0
    table = ScaleTable({}, {}, dict(quantization.input_scales))
    weights: dict[ModuleName, np.float32] = {}
    inputs: dict[ModuleName, np.float32] = {}
    scales: dict[ModuleName, float] = {}
    rows: dict[str, Float32] = {}
    for entry in entries:
        found, start = values[start : start + entry.size], start + entry.size
        value, kind = _float32(found.max()), "input" if entry.of_input else "weight"
        if not np.isfinite(value) or value < 0 or (entry.is_scale and value == 0):
            what = "scale" if entry.is_scale else "amax"
            faults.add(f"{entry.module}: {what} of its {kind} is {value}; calibrate the model again")
        if entry.num_rows:
            rows[row_slab(entry.measured[0].slab).name] = found
        elif entry.is_scale:
            scales[entry.module] = float(value)
        else:
            (inputs if entry.of_input else weights)[entry.module] = value
    _share_inputs(inputs, quantization)
    for module, value in inputs.items():
        if value == 0:
            faults.add(f"{module}: amax of its input is 0: it saw no data in calibration")
    faults.raise_if_any()
    return replace(table, weights=weights, inputs=inputs, weight_scales=scales, rows=rows)


def _share_inputs(inputs: dict[ModuleName, np.float32], quantization: Quantization) -> None:
    """Experts that saw no token in calibration (amax 0, or none) take the largest amax of their layer's others.

    Runtimes use the largest of all anyway; a scale of 1, which ModelOpt writes for such experts, would win over them.
    """
    largest: dict[ModuleName, np.float32] = defaultdict(np.float32)
    for module, value in inputs.items():
        if module.expert >= 0:
            largest[replace(module, expert=-1)] = max(largest[replace(module, expert=-1)], value)
    for module, scheme in quantization.schemes.items() if largest else ():
        of_all, known = replace(module, expert=-1), inputs.get(module, 0) or module in quantization.input_scales
        if of_all in largest and scheme.scheme in STATIC_INPUT and not known:
            inputs[module] = largest[of_all]


def _read(entry: Entry, reader: ViewReader) -> np.float32:
    assert entry.stored is not None
    values = reader.tensor(entry.stored)
    if values.size != 1:
        raise ExportError(f"{entry.stored.slab}: {list(entry.stored.shape)} where a single amax is expected")
    return _float32(values.reshape(-1)[0])


def measure(entry: Entry, reader: ViewReader) -> Float32:
    """The amax of an entry's weights (of each row where that is asked for), as far as `reader` has them."""
    axis = 1 if entry.num_rows else None
    found = [
        magnitudes(block, dtype_by_name(weight.dtype), axis=axis)
        for weight in entry.measured
        for block in reader.row_blocks(weight, MEASURE_BYTES)
    ]
    return np.concatenate(found) if entry.num_rows else np.maximum.reduce(found)  # keeps NaN


def magnitudes(raw: npt.NDArray[Any], dtype: DType, *, axis: int | None) -> Float32:
    """Largest magnitudes of raw elements. Without their sign floats are ordered like their bits, NaN above infinity,
    which spares the conversion of all of them."""
    sign = raw.dtype.type(1 << (8 * dtype.itemsize - 1))
    return to_float32(np.asarray((raw & ~sign).max(axis=axis, initial=0)), dtype)


def _num_bytes(tensor: SourceTensor) -> int:
    return int(np.prod(tensor.shape, dtype=np.int64)) * dtype_by_name(tensor.dtype).itemsize
