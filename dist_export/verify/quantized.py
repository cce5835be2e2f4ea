"""Quantised tensors recomputed: codes and block scales beside the source they are made of, all other scales by name.

The inverse rules say where each row of a source weight lies in the output; its scale follows from the module that the
weight belongs to, so a plan that takes another layer's scale, or amax in another order, does not prove itself.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum

import numpy as np

from dist_export.checkpoint.quantizer_names import ModuleName, Quantizer
from dist_export.checkpoint.quantizer_scheme import KvScheme
from dist_export.errors import ExportError
from dist_export.models.catalog import SourceTensor
from dist_export.models.value_ops import ValueOp
from dist_export.plan.recipes import Encoded, Folded
from dist_export.plan.work import OutputTensor, Use
from dist_export.tensors.boxes import Shape
from dist_export.tensors.dtypes import FLOAT8_E4M3, INT8, UINT8, DType
from dist_export.tensors.views import Slab
from dist_export.verify.inverse import RebuiltSource, SourceOrigin
from dist_export.verify.merging import Float32, rounded, to_float32
from dist_export.verify.output import Block, PlannedOutput, TensorId
from dist_export.verify.quantized_formulas import (
    FP4_COLUMNS,
    Form,
    Grain,
    e4m3_values,
    fp4_block_scales,
    packed,
    scale_of,
)
from dist_export.verify.quantizer_scales import WEIGHTS, QuantizerScales

Cells = tuple[int, int, int, int]
"""First row, row end, first column, column end."""


class Kind(Enum):
    """What a tensor beside a weight is."""

    SCALE = "scale of its weights"
    SECOND = "second scale of its weights"
    INPUT = "scale of its activations"
    FACTOR = "factor of its activations"
    KEY = "scale of the cached keys"
    VALUE = "scale of the cached values"
    KEY_VALUE = "scale of the cached keys and values"


KINDS: Mapping[str, Kind] = {
    "weights_scaling_factor": Kind.SCALE,
    "per_channel_scale": Kind.SCALE,
    "weight_scale": Kind.SCALE,
    "weights_scaling_factor_2": Kind.SECOND,
    "weight_scale_2": Kind.SECOND,
    "activation_scaling_factor": Kind.INPUT,
    "input_scale": Kind.INPUT,
    "prequant_scaling_factor": Kind.FACTOR,
    "pre_quant_scale": Kind.FACTOR,
    "k_cache_scaling_factor": Kind.KEY,
    "k_scale": Kind.KEY,
    "v_cache_scaling_factor": Kind.VALUE,
    "v_scale": Kind.VALUE,
    "kv_cache_scaling_factor": Kind.KEY_VALUE,
}
"""Last part of a tensor's name, as either target has it, to what it is."""


@dataclass(slots=True)
class Quantised:
    """One weight of the output that is made of quantised modules."""

    output: OutputTensor
    uses: list[tuple[SourceTensor, ModuleName, Use]] = field(default_factory=list)
    """What fills it: of which source weight and module."""
    companions: dict[Kind, OutputTensor] = field(default_factory=dict)

    @property
    def rows_per_slice(self) -> int:
        """Rows of one expert where the weight is stacked over experts, else all."""
        shape = self.output.planned.view.shape
        return shape[-2]

    def modules(self, row: int | None = None) -> tuple[ModuleName, ...]:
        """Those that fill the slice of a row, or the whole weight."""
        within = None if row is None else row // self.rows_per_slice
        found = (m for _, m, u in self.uses if within is None or u.row // self.rows_per_slice == within)
        return tuple(dict.fromkeys(found))


class QuantisedOutput:
    """The quantised tensors of an output, and what each must hold. `expected` may be called from several threads."""

    def __init__(self, output: PlannedOutput, scales: QuantizerScales, sources: Iterable[RebuiltSource]) -> None:
        self.output, self.scales = output, scales
        self.weights: dict[TensorId, Quantised] = {}
        self._modules: dict[Slab, tuple[SourceTensor, ModuleName]] = {}
        self._norms: dict[Slab, SourceOrigin] = {}
        self.unknown: list[TensorId] = []
        """Tensors that are made in a way which cannot be recomputed here."""
        for source in sources:
            self._enter(source)
        self._find_companions()

    def _enter(self, source: RebuiltSource) -> None:
        origin = source.origin
        module = module_of(origin)
        if module is None:
            self._norms[origin.tensor.slab] = origin
            return
        self._modules[origin.tensor.slab] = origin.tensor, module
        if module in self.scales.quantization.schemes:
            for use in source.work.uses:
                key = use.output.file, use.output.index
                weight = self.weights.setdefault(key, Quantised(use.output))
                weight.uses.append((origin.tensor, module, use))

    def _find_companions(self) -> None:
        """Tensors beside the weights, told by their names."""
        heads: dict[tuple[int, str], Quantised] = {}
        for key, weight in self.weights.items():
            if isinstance(weight.output.planned.recipe, Encoded):
                heads[key[0], weight.output.planned.name.rpartition(".")[0]] = weight
        self.kv_caches: dict[TensorId, tuple[Kind, int]] = {}
        for key, tensor in self.output.tensors.items():
            planned = tensor.planned
            if planned.recipe is None or key in self.weights or isinstance(planned.recipe, Folded):
                continue
            head, _, last = planned.name.rpartition(".")
            kind, owner = KINDS.get(last), heads.get((key[0], head))
            if kind in (Kind.KEY, Kind.VALUE, Kind.KEY_VALUE):
                self.kv_caches[key] = kind, -1
            elif kind is None or owner is None or kind in owner.companions:
                self.unknown.append(key)
            else:
                owner.companions[kind] = tensor

    def extended(self, source: RebuiltSource) -> RebuiltSource:
        """With the block scales that follow from the weights, which no rule names."""
        uses = list(source.work.uses)
        for use in source.work.uses:
            weight = self.weights.get((use.output.file, use.output.index))
            if weight is None or self._form(weight).grain is not Grain.FP4:
                continue
            scales = weight.companions.get(Kind.SCALE)
            uses += [replace(use, output=scales)] if scales is not None else []
        return replace(source, work=replace(source.work, uses=tuple(uses)))

    def _form(self, weight: Quantised) -> Form:
        form = self.scales.form(weight.modules()[0])
        return form if form is not None else NO_FORM

    def expected(self, slab: Slab, use: Use, block: Block, place: tuple[int, int], dtype: DType) -> Block:
        """What the output holds of a block of source elements (raw, of `dtype`), as stored.

        `place` is the block's first row and column in the source.
        """
        values = to_float32(block, dtype)
        planned = use.output.planned
        if isinstance(planned.recipe, Folded):
            return self._folded(slab, use, values, place)
        tensor, module = self._modules[slab]
        form = self.scales.form(module)
        row = use.row + place[0] - use.source[0]
        owner = self._owner(use)
        assert form is not None and owner is not None, f"{planned.name} cannot be recomputed"
        if use.output is owner.companions.get(Kind.SCALE):
            return fp4_block_scales(values, self._scalar(owner.modules(row)))
        cells = (place[0], place[0] + block.shape[0], place[1], place[1] + block.shape[1])
        return packed(form.codes(values / self.spread_scales(tensor, module, owner.modules(row), values, cells)), form)

    def _owner(self, use: Use) -> Quantised | None:
        owner = self.weights.get((use.output.file, use.output.index))
        if owner is None:
            head = use.output.planned.name.rpartition(".")[0]
            same = (w for k, w in self.weights.items() if k[0] == use.output.file)
            owner = next((w for w in same if w.output.planned.name.rpartition(".")[0] == head), None)
        return owner

    def spread_scales(
        self,
        tensor: SourceTensor,
        module: ModuleName,
        together: Sequence[ModuleName],
        values: Float32,
        cells: Cells,
        *,
        in_order: bool = True,
    ) -> Float32:
        """Scales that spread over `values`, the weights of a module's `cells`; `together` share a scale."""
        form = self.scales.form(module)
        assert form is not None, f"{module} is not quantised"
        if form.grain is Grain.MODULE:
            return np.array([[self._scalar(together)]], np.float32)
        top, bottom, left, right = cells
        if form.grain is Grain.FP4:
            second = self._scalar(together)
            scales = e4m3_values(fp4_block_scales(values, second)) * second
            return np.repeat(scales, FP4_COLUMNS, axis=1)
        amax = self.scales.row_amax(module, tensor, in_order=in_order)
        if form.grain is Grain.ROW:
            return scale_of(amax[top:bottom], form.divisor)
        size = tensor.shape[-1] // amax.shape[1]
        blocks = scale_of(amax[top:bottom, left // size : -(-right // size)], form.divisor)
        spread = np.repeat(blocks, size, axis=1)
        return spread[:, left % size : left % size + right - left]

    def _scalar(self, modules: Sequence[ModuleName]) -> np.float32:
        """The scale that modules share: of the largest amax."""
        form = self.scales.form(modules[0])
        assert form is not None, f"{modules[0]} is not quantised"
        amax = np.array([max(self.scales.weight_amax(module) for module in modules)], np.float32)
        result: np.float32 = scale_of(amax, form.second or form.divisor)[0]
        return result

    def _folded(self, slab: Slab, use: Use, values: Float32, place: tuple[int, int]) -> Block:
        """A norm that has taken over the factor of the linear behind it."""
        planned, origin = use.output.planned, self._norms[slab]
        factor = self.scales.factor(behind_norm(origin))
        if factor is None:
            raise ExportError(f"{planned.name}: the linear behind it has no factor to take over")
        for op in planned.values:
            step = np.float32(1 if op is ValueOp.ADD_ONE else -1)
            values = to_float32(rounded(values + step, planned.source_dtype), planned.source_dtype)
        values = to_float32(rounded(values, planned.dtype), planned.dtype)
        columns = slice(place[1], place[1] + values.shape[1])
        minus_one = origin.tensor.slab.name.endswith("weight") and self._stores_gamma_minus_one(planned.values)
        if minus_one:
            values = (values + np.float32(1)) * factor[columns] - np.float32(1)
        else:
            values = values * factor[columns]
        return rounded(np.ascontiguousarray(values), planned.dtype)

    def _stores_gamma_minus_one(self, ops: Sequence[ValueOp]) -> bool:
        offset = -1 if self.scales.quantization.logical.config.zero_centered_norm else 0
        offset += sum(1 if op is ValueOp.ADD_ONE else -1 for op in ops)
        return offset < 0

    def companion_cells(self, weight: Quantised, kind: Kind) -> Iterator[tuple[Cells, Float32]]:
        """What a tensor beside a weight must hold: (cells of it as a matrix, float32 values), part by part."""
        form = self._form(weight)
        if kind is Kind.INPUT:
            yield (0, 1, 0, 1), np.array([[self._input_scale(weight)]], np.float32)
        elif kind is Kind.SECOND or (kind is Kind.SCALE and form.grain is Grain.MODULE):
            rows = int(np.prod(weight.output.planned.view.shape[:-1]))
            for number, row in enumerate(range(0, rows, weight.rows_per_slice)):
                yield (number, number + 1, 0, 1), np.array([[self._scalar(weight.modules(row))]], np.float32)
        elif kind is Kind.FACTOR:
            for tensor, module, use in weight.uses:
                factor = self.scales.factor(module)
                if factor is None:
                    raise ExportError(f"{module}: the checkpoint has no factor of its activations")
                _, _, left, right = use.source
                number = use.row // weight.rows_per_slice
                yield (number, number + 1, use.column, use.column + right - left), factor[None, left:right]
        else:
            for tensor, module, use in weight.uses:
                yield from self._row_scales(tensor, module, use, form)

    def _row_scales(
        self, tensor: SourceTensor, module: ModuleName, use: Use, form: Form
    ) -> Iterator[tuple[Cells, Float32]]:
        top, bottom, left, right = use.source
        amax = self.scales.row_amax(module, tensor)
        first, end, column = 0, 1, 0
        if form.grain is Grain.BLOCK:
            size = tensor.shape[-1] // amax.shape[1]
            first, end, column = left // size, -(-right // size), use.column // size
        scales = scale_of(amax[top:bottom, first:end], form.divisor)
        yield (use.row, use.row + bottom - top, column, column + end - first), scales

    def _input_scale(self, weight: Quantised) -> np.float32:
        """Experts that lie in one tensor take the largest of all of the layer's, on every rank."""
        modules = list(weight.modules())
        if len(weight.output.planned.view.shape) == 3:
            experts = range(self.scales.quantization.logical.config.num_experts)
            modules = [replace(module, expert=expert) for module in modules for expert in experts]
        return np.float32(max(self.scales.input_scale(module) for module in dict.fromkeys(modules)))

    def kv_scale(self, kind: Kind, layer: int, *, clamped: bool) -> np.float32:
        """Of the KV cache of a layer. `clamped`: at least 1, as TensorRT-LLM's FP8 scales are written."""
        quantization = self.scales.quantization
        if quantization.kv_cache_scale is not None:
            return np.float32(quantization.kv_cache_scale)
        wanted = {Kind.KEY: (Quantizer.KEY,), Kind.VALUE: (Quantizer.VALUE,)}.get(kind, (Quantizer.KEY, Quantizer.VALUE))
        amax = np.array([max(self.scales.kv_amax(layer, each) for each in wanted)], np.float32)
        fp8 = quantization.kv_cache is KvScheme.FP8
        scale = scale_of(amax, 448.0 if fp8 else 127.0)[0]
        return np.float32(max(scale, np.float32(1))) if clamped and fp8 else np.float32(scale)


NO_FORM = Form(Grain.MODULE, lambda values: values.view(np.uint8), 1.0)


def module_of(origin: SourceOrigin) -> ModuleName | None:
    """The module whose weight a source is; None for everything else."""
    pattern, _, last = origin.rule.source.rpartition(".")
    if last not in WEIGHTS:
        return None
    layer = origin.place.layer if "{layer}" in pattern else -1
    return ModuleName(pattern, layer, origin.place.expert if "{expert}" in pattern else -1)


_BEHIND = {"input_layernorm": "self_attention.linear_qkv", "pre_mlp_layernorm": "mlp.linear_fc1"}


def behind_norm(origin: SourceOrigin) -> ModuleName:
    """The linear whose input a norm makes: the one it is fused with, or the next in the layer."""
    head, _, last = origin.rule.source.rpartition(".")
    if not last.startswith("layer_norm_"):
        layer, _, norm = head.rpartition(".")
        head = f"{layer}.{_BEHIND.get(norm, norm)}"
    return ModuleName(head, origin.place.layer)


def stored_dtypes(form: Form) -> tuple[DType, ...]:
    """Element types that hold the codes of a form."""
    if form.rows_per_byte == 2:
        return (INT8, UINT8)
    if form.columns_per_byte == 2:
        return (UINT8,)
    return (INT8,) if form.divisor == 127.0 else (FLOAT8_E4M3,)


def stored_shape(form: Form, shape: Shape) -> Shape:
    """Of the codes of weights of `shape`."""
    return (*shape[:-2], shape[-2] // form.rows_per_byte, shape[-1] // form.columns_per_byte)


def by_source(weights: Mapping[TensorId, Quantised]) -> dict[Slab, list[TensorId]]:
    """Source weight -> the quantised tensors made of it."""
    found: dict[Slab, list[TensorId]] = defaultdict(list)
    for key, weight in weights.items():
        for tensor, _, _ in weight.uses:
            found[tensor.slab].append(key)
    return found
