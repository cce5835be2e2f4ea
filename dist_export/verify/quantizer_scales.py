"""What the quantisers of a checkpoint hold, read once more for the comparison: amax of weights and inputs, factors.

How the model is quantised is taken from the plan's `Quantization`; the numbers, their order and what they are
divided by are worked out here. Values are in the order of the source weight's own rows and columns.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from threading import Lock

import numpy as np
from msgspec import Struct, field
from msgspec.structs import replace

from dist_export.checkpoint.index import CheckpointIndex
from dist_export.checkpoint.quantizer_names import ModuleName, Quantity, Quantizer, QuantizerTensor, quantizer_tensor
from dist_export.checkpoint.quantizer_scheme import KvScheme
from dist_export.errors import ExportError
from dist_export.models.quantization import Quantization
from dist_export.models.source_tensor import SourceTensor
from dist_export.plan.work import SlabUses
from dist_export.tensors.boxes import Box
from dist_export.tensors.dtypes import FLOAT8_E4M3, DType, dtype_by_name
from dist_export.verify.merging import Float32, merge_rows, rounded, to_float32
from dist_export.verify.quantized_formulas import FORMS, Form, Grain, e4m3_values, single
from dist_export.verify.source_reader import SourceReader

MEASURE_BYTES = 1 << 20  # of rows measured at a time
MOST_KEPT = 8  # tensors of quantisers that are kept once read
ATTENTION = "decoder.layers.{layer}.self_attention.core_attention"
WEIGHTS = ("weight", "weight_w", "weight_v")
"""What a module may call its weight: whole, or its gate and its up."""


class QuantizerScales(Struct):
    """Reads and measures. Any thread may use it."""

    quantization: Quantization
    index: CheckpointIndex
    reader: SourceReader
    measured: dict[ModuleName, np.float32] = field(default_factory=dict)
    """Amax of weights that no quantiser stores: see `to_measure`."""
    _kept: OrderedDict[SourceTensor, Float32] = field(default_factory=OrderedDict)
    _lock: Lock = field(default_factory=Lock)

    def form(self, module: ModuleName) -> Form | None:
        """How a module's weights are stored; None when they are not quantised, or in a way that is not known here."""
        scheme = self.quantization.schemes.get(module)
        return FORMS.get(scheme.scheme) if scheme is not None else None

    def stored(self, module: ModuleName, quantizer: Quantizer, quantity: Quantity, level: int | None = None) -> Float32:
        """A quantiser's tensor as ``[rows, columns]``. `ExportError` when there is none."""
        found = self.quantization.tensors.find(module, quantizer, quantity, level)
        if found is None:
            raise ExportError(f"{module}: the checkpoint has no {quantity.value} of its {quantizer.value}")
        return self._read(found)

    def weight_amax(self, module: ModuleName) -> np.float32:
        """Amax of a module's whole weight: the stored one, else as it was measured."""
        if module in self.measured:
            return single(self.measured[module])
        amax = _only(self.stored(module, Quantizer.WEIGHT, Quantity.AMAX, self._level(module)), module)
        if amax == 0:  # calibration never saw it
            amax = self.measured[module] = self._measure(module)
        return amax

    def input_scale(self, module: ModuleName) -> np.float32:
        """Scale of the activations of a module, by its own form's divisor."""
        if module in self.quantization.input_scales:
            return single(self.quantization.input_scales[module])
        form = self.form(module)
        assert form is not None, f"{module} is not quantised"
        amax = self._input_amax(module)
        if not amax and module.expert >= 0:  # it saw no token: the largest of the layer's other experts
            amax = max(self._input_amax(other) for other in self._experts_of(module))
        if not amax:
            raise ExportError(f"{module}: the checkpoint has no amax of its inputs")
        return single(amax / np.float32(form.inputs))

    def _input_amax(self, module: ModuleName) -> np.float32:
        """0 where none is stored."""
        found = self.quantization.tensors.find(module, Quantizer.INPUT, Quantity.AMAX)
        return single(0) if found is None else _only(self._read(found), module)

    def _experts_of(self, module: ModuleName) -> list[ModuleName]:
        experts = range(self.quantization.logical.config.num_experts)
        return [replace(module, expert=expert) for expert in experts]

    def is_compressed(self, module: ModuleName) -> bool:
        """Whether the checkpoint stores the codes of a module's weight, not the weight."""
        scheme = self.quantization.schemes.get(module)
        return scheme is not None and scheme.compressed

    def stored_scale(self, module: ModuleName) -> np.float32:
        """The scale of a whole weight that is stored as codes."""
        form = self.form(module)
        quantity = Quantity.DOUBLE_SCALE if form is not None and form.grain is Grain.FP4 else Quantity.SCALE
        return _only(self.stored(module, Quantizer.WEIGHT, quantity), module)

    def smoothed(self, module: ModuleName, values: Float32, columns: tuple[int, int], dtype: DType) -> Float32:
        """Weights of some columns as they are quantised: divided by what a calibration file has for each column."""
        found = self.quantization.tensors.find(module, Quantizer.INPUT, Quantity.SMOOTHING)
        if found is None:
            return values
        inverse = np.float32(1) / self._read(found).reshape(-1)[slice(*columns)]
        return to_float32(rounded(np.ascontiguousarray(values * inverse), dtype), dtype)

    def factor(self, module: ModuleName) -> Float32 | None:
        """``[in]``: what activations are multiplied by; None where the checkpoint has none."""
        found = self.quantization.tensors.find(module, Quantizer.INPUT, Quantity.PRE_QUANT_SCALE)
        return None if found is None else self._read(found).reshape(-1)

    def has_factor(self, module: ModuleName) -> bool:
        """Whether the checkpoint has a factor of the module's activations."""
        return self.quantization.tensors.find(module, Quantizer.INPUT, Quantity.PRE_QUANT_SCALE) is not None

    def kv_amax(self, layer: int, quantizer: Quantizer) -> np.float32:
        """Of a layer's keys or values. Those that training kept are scales of FP8: 448 of them."""
        part = "key" if quantizer is Quantizer.KEY else "value"
        kept = self.quantization.input_scales.get(ModuleName(f"{ATTENTION}.{part}", layer))
        if kept is not None:
            return single(np.float32(kept) * np.float32(448))
        return _only(self.stored(ModuleName(ATTENTION, layer), quantizer, Quantity.AMAX), f"layer {layer}")

    def row_amax(self, module: ModuleName, weight: SourceTensor, *, in_order: bool = True) -> Float32:
        """``[rows, 1]`` or ``[rows, blocks]`` for the rows of `weight`, one of the module's weight tensors.

        `in_order`: gate before up. Without it as stored: in the order in which training ranks held them.
        """
        form = self.form(module)
        assert form is not None, f"{module} is not quantised"
        of_codes = self.is_compressed(module)  # scales, in the place of amax
        level = None if form.grain is Grain.FP4 else form.level
        quantity = Quantity.SCALE if of_codes else Quantity.AMAX
        found = self.quantization.tensors.find(module, Quantizer.WEIGHT, quantity, level)
        if found is None and form.grain is Grain.ROW:
            return self._measured_rows(module, weight)
        if found is None:
            raise ExportError(f"{module}: the checkpoint has no amax of {form.grain.value} of its weight")
        amax = self._read(found)
        if of_codes and form.grain is Grain.BLOCK:
            amax = self._blocks_by_row(amax, module)
        if in_order and self._is_gated(module):
            amax = self._gate_before_up(amax, found)
        part = weight.slab.name.rpartition(".")[2]
        half = len(amax) // 2
        if part in ("weight_w", "weight_v"):
            amax = amax[:half] if part == "weight_w" else amax[half:]
        if len(amax) != weight.shape[0]:
            raise ExportError(f"{found.slab}: {len(amax)} rows of amax for the {weight.shape[0]} of {weight.slab}")
        return amax

    def _blocks_by_row(self, scales: Float32, module: ModuleName) -> Float32:
        """``[rows, blocks]``, out of a column per training rank that has its scales row after row."""
        rows = sum(weight.shape[0] for weight in self.weights_of(module))
        if len(scales) % rows:
            raise ExportError(f"{module}: {len(scales)} scales of blocks do not belong to {rows} rows")
        by_rank = scales.reshape(rows, len(scales) // rows, -1)
        return np.ascontiguousarray(by_rank.transpose(0, 2, 1)).reshape(rows, -1)

    def to_measure(self) -> list[ModuleName]:
        """Modules with one scale of which no amax is stored, in the same order everywhere."""
        modules = []
        for module in self.quantization.modules():
            form = self.form(module)
            if form is None or self.is_compressed(module):
                continue
            if form.grain not in (Grain.MODULE, Grain.FP4) and not form.second:
                continue
            if self.quantization.tensors.find(module, Quantizer.WEIGHT, Quantity.AMAX, self._level(module)) is None:
                modules.append(module)
        return modules

    def measure(self, modules: Sequence[ModuleName]) -> Float32:
        """Amax of the modules' weights, read from end to end."""
        return np.array([self._measure(module) for module in modules], np.float32)

    def used(self) -> Iterator[SourceTensor | None]:
        """Every quantiser tensor that the export's numbers come from."""
        find = self.quantization.tensors.find
        for module in self.quantization.modules():
            form = self.form(module)
            if form is None:
                continue
            yield find(module, Quantizer.WEIGHT, Quantity.AMAX, form.level)
            yield find(module, Quantizer.WEIGHT, Quantity.AMAX, self._level(module))
            yield find(module, Quantizer.WEIGHT, Quantity.SCALE, form.level)
            yield find(module, Quantizer.WEIGHT, Quantity.DOUBLE_SCALE)
            yield find(module, Quantizer.INPUT, Quantity.PRE_QUANT_SCALE)
            yield find(module, Quantizer.INPUT, Quantity.SMOOTHING)
            if form.inputs and module not in self.quantization.input_scales:
                yield find(module, Quantizer.INPUT, Quantity.AMAX)
        if self.quantization.kv_cache is not KvScheme.NONE and self.quantization.kv_cache_scale is None:
            for layer in range(self.quantization.logical.config.num_layers):
                yield find(ModuleName(ATTENTION, layer), Quantizer.KEY, Quantity.AMAX)
                yield find(ModuleName(ATTENTION, layer), Quantizer.VALUE, Quantity.AMAX)

    def weights_of(self, module: ModuleName) -> Iterator[SourceTensor]:
        """The weight tensors of a module."""
        for name in WEIGHTS:
            pattern = f"{module.pattern}.{name}"
            found = self.quantization.logical.catalog.find(pattern, layer=module.layer, expert=module.expert)
            if found is not None:
                yield found

    def _level(self, module: ModuleName) -> int | None:
        """Where the amax of the whole weight lies: W4A8's first quantiser has that of blocks."""
        form = self.form(module)
        return 1 if form is not None and form.level == 0 else None

    def _is_gated(self, module: ModuleName) -> bool:
        return module.pattern.endswith(".linear_fc1") and self.quantization.logical.config.gated

    def _gate_before_up(self, amax: Float32, tensor: SourceTensor) -> Float32:
        """Out of the order of training ranks, each of which saved its gate and then its up."""
        box = Box((*tensor.slab.prefix, 0, 0), (*(1 for _ in tensor.slab.prefix), *tensor.shape))
        starts = {chunk.box.start[len(tensor.slab.prefix)] for chunk in self.index.chunks(tensor.slab.name, box)}
        num_ranks, rows = len(starts), len(amax)
        if rows % (2 * num_ranks):
            raise ExportError(f"{tensor.slab}: {rows} rows of {num_ranks} ranks cannot be halved")
        by_rank = amax.reshape(num_ranks, 2, rows // (2 * num_ranks), -1)
        return np.ascontiguousarray(by_rank.transpose(1, 0, 2, 3)).reshape(amax.shape)

    def _read(self, tensor: SourceTensor) -> Float32:
        with self._lock:
            if tensor in self._kept:
                self._kept.move_to_end(tensor)
                return self._kept[tensor]
        raw, dtype = self.reader.tensor(tensor), dtype_by_name(tensor.dtype)
        values = e4m3_values(raw) if dtype is FLOAT8_E4M3 else to_float32(raw, dtype)
        with self._lock:
            self._kept[tensor] = values
            if len(self._kept) > MOST_KEPT:
                self._kept.popitem(last=False)
        return values

    def _measured_rows(self, module: ModuleName, weight: SourceTensor) -> Float32:
        """``[rows, 1]``: amax of the rows of a weight that nobody has calibrated."""
        with self._lock:
            if weight in self._kept:
                return self._kept[weight]
        rows = np.concatenate([np.abs(block).max(1, keepdims=True) for block in self._blocks(module, weight)])
        with self._lock:
            self._kept[weight] = rows
        return rows

    def _measure(self, module: ModuleName) -> np.float32:
        largest = np.float32(0)
        for weight in self.weights_of(module):
            for block in self._blocks(module, weight):
                largest = np.maximum(largest, np.abs(block).max())
        return single(largest)

    def _blocks(self, module: ModuleName, weight: SourceTensor) -> Iterator[Float32]:
        """A weight from top to bottom, with what adapters add."""
        dtype, update = dtype_by_name(weight.dtype), self.quantization.logical.catalog.updates.get(weight.slab)
        work = SlabUses(weight.slab, weight.shape, dtype, (), update)
        rectangles = self.reader.sources.rectangles(weight.slab, weight.shape, dtype)
        step = max(MEASURE_BYTES // (weight.shape[-1] * dtype.itemsize), 1)
        for first in range(0, weight.shape[0], step):
            rows = (first, min(first + step, weight.shape[0]))
            band = self.reader.read(work, rectangles, rows)
            if update is not None:
                merge_rows(work, band, rows, lambda tensor, at: self.reader.tensor(tensor, at))
            yield self.smoothed(module, to_float32(band, dtype), (0, weight.shape[-1]), dtype)


def _only(values: Float32, what: object) -> np.float32:
    if values.size != 1:
        raise ExportError(f"{what}: an amax of {values.size} numbers where one is expected")
    return single(values.reshape(-1)[0])


def not_used(scales: QuantizerScales, used: Iterable[SourceTensor | None]) -> dict[str, list[str]]:
    """Why quantisers' tensors are left out -> their names; those that should have been used under an empty reason."""
    taken = {each.slab.name for each in used if each is not None}
    left: dict[str, list[str]] = {}
    quantization = scales.quantization
    for name in quantization.tensors.catalog.tensors:
        tensor = quantizer_tensor(name)
        if name in taken or tensor is None:
            continue
        if tensor.quantizer is Quantizer.NORM_INPUT:
            reason = "of the inputs of norms"
        elif tensor.quantizer in (Quantizer.QUERY, Quantizer.OUTPUT):
            reason = "of queries and outputs, which no runtime takes"
        elif tensor.quantizer in (Quantizer.KEY, Quantizer.VALUE):
            reason = "of a KV cache that is exported without them"
        elif not any(_same(tensor.module, module) for module in quantization.schemes):
            reason = "of linears that are not exported quantised"
        elif tensor.quantity is Quantity.AMAX and _is_of_codes(scales, tensor):
            reason = "of weights that are stored as codes, with scales of their own"
        elif tensor.quantizer is Quantizer.INPUT and tensor.quantity is Quantity.AMAX:
            reason = "of activations whose scale comes from elsewhere, or is found when serving"
        else:
            reason = ""
        left.setdefault(reason, []).append(name)
    return left


def _is_of_codes(scales: QuantizerScales, tensor: QuantizerTensor) -> bool:
    of_weight, modules = tensor.quantizer is Quantizer.WEIGHT, scales.quantization.schemes
    return of_weight and any(_same(tensor.module, other) and scales.is_compressed(other) for other in modules)


def _same(module: ModuleName, other: ModuleName) -> bool:
    """Whether a tensor's module, in which layers or experts may be stacked, is or has `other`."""
    return module.pattern == other.pattern and module.layer in (-1, other.layer) and module.expert in (-1, other.expert)
