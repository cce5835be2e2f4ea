"""The scale table: every amax and activation scale that a run needs, found before the first quantised byte.

Values from the checkpoint are read, those of weights that nobody calibrated are measured; each process finds its share
and one MAX all-reduce gives all processes the same table, whatever their number.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dist_export.checkpoint.quantizer_names import ModuleName, Quantity, Quantizer
from dist_export.checkpoint.quantizer_scheme import KvScheme, Scheme
from dist_export.convert.view_reader import ViewReader
from dist_export.errors import ExportError, Faults
from dist_export.models.catalog import SourceTensor
from dist_export.models.quantization import PER_TENSOR, STATIC_INPUT, Quantization, kv_module
from dist_export.tensors.dtypes import dtype_by_name

Float32 = npt.NDArray[np.float32]
MEASURE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class ScaleTable:
    """Amax of weights and of activations by module, float32."""

    weights: Mapping[ModuleName, np.float32]
    inputs: Mapping[ModuleName, np.float32]
    input_scales: Mapping[ModuleName, float]
    """Dequantisation scales of FP8 activations where training kept those; exact, so never turned into an amax."""

    def weight_scale(self, modules: Iterable[ModuleName], divisor: float) -> np.float32:
        """amax / divisor of the modules together. A weight of zeros has scale 1."""
        amax = max(self.weights[module] for module in modules)
        return _scale(amax, divisor)

    def input_scale(self, modules: Iterable[ModuleName], divisor: float) -> np.float32:
        """amax / divisor of the modules' activations together."""
        known = list(modules)
        scales = [np.float32(self.input_scales[each]) for each in known if each in self.input_scales]
        if scales:
            assert len(scales) == len(known) and divisor == FP8_MAX, "training keeps FP8 scales of all or none"
            return max(scales)
        return _scale(max(self.inputs[module] for module in known), divisor)

    def encode(self) -> bytes:
        """As bytes for a file; `decode` gives the same table."""
        tables: tuple[Mapping[ModuleName, float], ...] = (
            {module: float(value) for module, value in self.weights.items()},
            {module: float(value) for module, value in self.inputs.items()},
            self.input_scales,
        )
        plain = [[[m.pattern, m.layer, m.expert, value] for m, value in each.items()] for each in tables]
        return json.dumps(plain).encode()

    @staticmethod
    def decode(data: bytes) -> ScaleTable:
        """What `encode` made."""
        tables = [
            {ModuleName(pattern, layer, expert): np.float32(value) for pattern, layer, expert, value in each}
            for each in json.loads(data)
        ]
        return ScaleTable(tables[0], tables[1], {module: float(value) for module, value in tables[2].items()})


FP8_MAX, NVFP4_MAX, INT8_MAX, INT4_MAX = 448.0, 6.0 * 448.0, 127.0, 7.0


def _scale(amax: np.float32, divisor: float) -> np.float32:
    return _float32(amax / np.float32(divisor)) if amax > 0 else _float32(1.0)


def _float32(value: Any) -> np.float32:
    result: np.float32 = np.float32(value)
    return result


@dataclass(frozen=True, slots=True)
class Entry:
    """One number of the table to find: stored as a scalar, or measured on the module's weights."""

    module: ModuleName
    of_input: bool
    stored: SourceTensor | None
    measured: tuple[SourceTensor, ...] = ()

    @property
    def num_bytes(self) -> int:
        """Weight bytes to read for it."""
        return sum(_num_bytes(each) for each in self.measured)


def entries_of(quantization: Quantization) -> list[Entry]:
    """What has to be found, in the same order everywhere. `ExportError` naming every activation without a scale."""
    faults, entries = Faults("activations without a scale"), []
    for module in quantization.modules():
        scheme = quantization.schemes[module]
        if scheme.scheme in PER_TENSOR:
            level = 1 if scheme.scheme is Scheme.W4A8_AWQ else None
            stored = quantization.tensors.find(module, Quantizer.WEIGHT, Quantity.AMAX, level)
            entries.append(Entry(module, False, stored, () if stored else weights_of(quantization, module)))
        if scheme.scheme in STATIC_INPUT and module not in quantization.input_scales:
            stored = quantization.tensors.find(module, Quantizer.INPUT, Quantity.AMAX)
            if stored is None:
                faults.add(f"{module}: {scheme.scheme.value} needs an amax of its input and there is none")
            entries.append(Entry(module, True, stored))
    if quantization.kv_cache is not KvScheme.NONE and quantization.kv_cache_scale is None:
        for layer in range(quantization.logical.config.num_layers):
            for part, tensor in zip(("key", "value"), quantization.kv_amax(layer), strict=True):
                entries.append(Entry(kv_module(layer, part), True, tensor))
    faults.raise_if_any()
    return entries


def weights_of(quantization: Quantization, module: ModuleName) -> tuple[SourceTensor, ...]:
    """The stored weight tensors of a module."""
    catalog = quantization.logical.catalog
    names = ("weight", "weight_w", "weight_v")
    found = [catalog.find(f"{module.pattern}.{n}", layer=module.layer, expert=module.expert) for n in names]
    return tuple(each for each in found if each is not None)


def share(entries: Sequence[Entry], rank: int, world_size: int) -> list[int]:
    """Numbers of the entries that one process finds: balanced by the bytes they take."""
    loads, mine = [0] * world_size, []
    for number in sorted(range(len(entries)), key=lambda n: (-entries[n].num_bytes, n)):
        target = loads.index(min(loads))
        loads[target] += entries[number].num_bytes + 1
        if target == rank:
            mine.append(number)
    return sorted(mine)


def find(entries: Sequence[Entry], numbers: Sequence[int], reader: ViewReader) -> Float32:
    """The values of the entries `numbers`, -inf for all others: float32, as long as `entries`."""
    values = np.full(len(entries), -np.inf, np.float32)
    for number in numbers:
        entry = entries[number]
        values[number] = _read(entry, reader) if entry.stored else _measure(entry.measured, reader)
    return values


def table_of(entries: Sequence[Entry], values: Float32, quantization: Quantization) -> ScaleTable:
    """The table, of values from all processes. `ExportError` naming every value that no scale can be made of."""
    faults = Faults("scales")
    weights: dict[ModuleName, np.float32] = {}
    inputs: dict[ModuleName, np.float32] = {}
    for entry, value in zip(entries, values, strict=True):
        kind = "input" if entry.of_input else "weight"
        if not np.isfinite(value) or value < 0:
            faults.add(f"{entry.module}: amax of its {kind} is {value}; calibrate the model again")
        elif value == 0 and entry.of_input:
            faults.add(f"{entry.module}: amax of its input is 0: it saw no data in calibration")
        (inputs if entry.of_input else weights)[entry.module] = value
    faults.raise_if_any()
    return ScaleTable(weights, inputs, dict(quantization.input_scales))


def _read(entry: Entry, reader: ViewReader) -> np.float32:
    assert entry.stored is not None
    values = reader.tensor(entry.stored)
    if values.size != 1:
        raise ExportError(f"{entry.stored.slab}: {list(entry.stored.shape)} where a single amax is expected")
    return _float32(values.reshape(-1)[0])


def _measure(weights: Sequence[SourceTensor], reader: ViewReader) -> np.float32:
    largest = np.float32(0)
    for weight in weights:
        for block in reader.row_blocks(weight, MEASURE_BYTES):
            largest = np.maximum(largest, np.abs(block).max(initial=np.float32(0)))  # keeps NaN
    return _float32(largest)


def _num_bytes(tensor: SourceTensor) -> int:
    return int(np.prod(tensor.shape, dtype=np.int64)) * dtype_by_name(tensor.dtype).itemsize
