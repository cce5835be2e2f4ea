"""Quantised tensors recomputed: codes and block scales beside the source they are made of, all other scales by name.

The inverse rules say where each row of a source weight lies in the output; its scale follows from the module that the
weight belongs to, so a plan that takes another layer's scale, or amax in another order, does not prove itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from msgspec.structs import replace

from dist_export.checkpoint.quantizer_names import ModuleName, Quantizer
from dist_export.checkpoint.quantizer_scheme import KvScheme, Scheme
from dist_export.errors import ExportError
from dist_export.models.source_tensor import SourceTensor
from dist_export.models.value_ops import ValueOp
from dist_export.plan.recipes import Codes, Encoded, Folded
from dist_export.plan.work import OutputTensor, Use
from dist_export.tensors.dtypes import DType
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
    no_scales,
    packed,
    scale_of,
    single,
    stored_int4,
    stored_scales,
)
from dist_export.verify.quantized_names import KINDS, RECIPROCAL, TAKES_OVER, Cells, Kind, Quantised
from dist_export.verify.quantizer_scales import WEIGHTS, QuantizerScales


class QuantisedOutput:
    """The quantised tensors of an output, and what each must hold. `expected` may be called from several threads."""

    def __init__(self, output: PlannedOutput, scales: QuantizerScales, sources: Iterable[RebuiltSource]) -> None:
        self.output, self.scales = output, scales
        self.weights: dict[TensorId, Quantised] = {}
        self._modules: dict[Slab, tuple[SourceTensor, ModuleName]] = {}
        self._norms: dict[Slab, SourceOrigin] = {}
        self.unknown: list[TensorId] = []
        """Tensors that are made in a way which cannot be recomputed here."""
        self.kv_caches: dict[TensorId, tuple[Kind, int]] = {}
        """Scales of the KV cache, of which layer."""
        self._layers: dict[tuple[int, str], int] = {}
        self.folded: set[ModuleName] = set()
        """Linears whose factor the norm before them has taken over."""
        self.plain: dict[TensorId, ModuleName] = {}
        """Weights that keep their precision and take over the factor of their own activations."""
        self._owners: dict[TensorId, Quantised] = {}
        for source in sources:
            self._enter(source)
        self._find_companions()

    def _enter(self, source: RebuiltSource) -> None:
        origin = source.origin
        module = module_of(origin)
        for use in source.work.uses:
            self._layers[use.output.file, _layer_part(use.output.planned.name)] = origin.place.layer
        if module is None:
            self._norms[origin.tensor.slab] = origin
            if any(isinstance(use.output.planned.recipe, Folded) for use in source.work.uses):
                self.folded.add(behind_norm(origin))
            return
        self._modules[origin.tensor.slab] = origin.tensor, module
        if module in self.scales.quantization.schemes:
            for use in source.work.uses:
                key, recipe = (use.output.file, use.output.index), use.output.planned.recipe
                if isinstance(recipe, Encoded) and recipe.codes.are_weights:
                    self.plain[key] = module
                    continue
                weight = self.weights.setdefault(key, Quantised(use.output))
                weight.uses.append((origin.tensor, module, use))

    def _find_companions(self) -> None:
        """Tensors beside the weights, told by their names."""
        heads: dict[tuple[int, str], Quantised] = {}
        for key, weight in self.weights.items():
            heads[key[0], weight.output.planned.name.rpartition(".")[0]] = weight
            self._owners[key] = weight
        for key, tensor in self.output.tensors.items():
            planned = tensor.planned
            if key in self.weights or key in self.plain or isinstance(planned.recipe, Folded):
                continue
            if planned.recipe is None and planned.name.rpartition(".")[2] not in KINDS:
                continue
            head, _, last = planned.name.rpartition(".")
            kind, owner = KINDS.get(last), heads.get((key[0], head))
            if kind in (Kind.KEY, Kind.VALUE, Kind.KEY_VALUE):
                self.kv_caches[key] = kind, self._layers.get((key[0], _layer_part(planned.name)), -1)
            elif kind is None or owner is None or kind in owner.companions:
                self.unknown.append(key)
            else:
                owner.companions[kind] = tensor
                self._owners[key] = owner

    def knows(self, key: TensorId) -> bool:
        """Whether a tensor with a recipe can be recomputed."""
        owner = self._owners.get(key)
        if owner is not None:
            return self.form(owner) is not None
        is_folded = isinstance(self.output.tensors[key].planned.recipe, Folded)
        return is_folded or key in self.kv_caches or key in self.plain

    def extended(self, source: RebuiltSource) -> RebuiltSource:
        """With the block scales that follow from the weights, which no rule names."""
        uses = list(source.work.uses)
        for use in source.work.uses:
            weight = self.weights.get((use.output.file, use.output.index))
            form = None if weight is None else self.form(weight)
            if weight is None or form is None or form.grain is not Grain.FP4 or self.is_stored(weight):
                continue
            scales = weight.companions.get(Kind.SCALE)
            uses += [replace(use, output=scales)] if scales is not None else []
        return replace(source, work=replace(source.work, uses=tuple(uses)))

    def form(self, weight: Quantised) -> Form | None:
        """How a weight is stored; None when that cannot be recomputed."""
        recipe, forms = weight.output.planned.recipe, {self.scales.form(module) for module in weight.modules()}
        found = forms.pop() if len(forms) == 1 else None
        if found is None or (recipe is None and not self.is_stored(weight)):
            return None
        if isinstance(recipe, Encoded) and recipe.codes in (Codes.INT4_WORDS, Codes.STORED_INT4_WORDS):
            return replace(found, rows_per_byte=1, words=True)
        return found

    def is_stored(self, weight: Quantised) -> bool:
        """Whether the checkpoint stores the codes themselves."""
        return all(self.scales.is_compressed(module) for module in weight.modules())

    def expected(self, slab: Slab, use: Use, block: Block, place: tuple[int, int], dtype: DType) -> Block:
        """What the output holds of a block of source elements (raw, of `dtype`), as stored.

        `place` is the block's first row and column in the source.
        """
        values = to_float32(block, dtype)
        planned = use.output.planned
        if isinstance(planned.recipe, Folded):
            return self._folded(slab, use, values, place)
        tensor, module = self._modules[slab]
        columns = place[1], place[1] + block.shape[1]
        if (use.output.file, use.output.index) in self.plain:
            factor = self.scales.factor(module)
            assert factor is not None, f"{planned.name} takes over its factor"
            if self.scales.is_compressed(module):
                return self._out_of_codes(tensor, module, block, place, planned.dtype)
            return rounded(np.ascontiguousarray(values * factor[slice(*columns)]), planned.dtype)
        if isinstance(planned.recipe, Encoded) and planned.recipe.codes.are_stored:
            return self._stored_codes(tensor, module, block, (place[0], place[0] + block.shape[0], *columns), use)
        values = self.scales.smoothed(module, values, columns, dtype)
        row = use.row + place[0] - use.source[0]
        owner = self.owner(use.output)
        form = self.form(owner)
        assert form is not None, f"{planned.name} cannot be recomputed"
        if use.output is owner.companions.get(Kind.SCALE):
            return fp4_block_scales(values, self.scalar(owner.modules(row)))
        cells = (place[0], place[0] + block.shape[0], *columns)
        return packed(form.codes(values / self.spread_scales(tensor, module, owner.modules(row), values, cells)), form)

    def _stored_codes(self, tensor: SourceTensor, module: ModuleName, block: Block, cells: Cells, use: Use) -> Block:
        """Codes that the checkpoint has, as the output packs them; 0 where their scale is none."""
        form, scheme = self.form(self.owner(use.output)), self.scales.quantization.schemes[module].scheme
        assert form is not None, f"{use.output.planned.name} is quantised"
        if form.grain is Grain.MODULE:
            return block.view(np.uint8)
        each = 2 if form.grain is Grain.BLOCK else 1  # columns in a byte
        codes = stored_int4(block.view(np.uint8)) if each == 2 else block.view(np.uint8)
        top, bottom, left, right = cells
        found = no_scales(self.scales.row_amax(module, tensor)[top:bottom], scheme)
        spread = np.repeat(found, tensor.shape[-1] * each // found.shape[1], axis=1)[:, left * each : right * each]
        return packed(np.where(spread, np.uint8(0), codes).astype(np.uint8), form)

    def _out_of_codes(
        self, tensor: SourceTensor, module: ModuleName, block: Block, place: tuple[int, int], dtype: DType
    ) -> Block:
        """The weight that codes of the checkpoint stand for, with the factor of its activations."""
        form, scheme, factor = (
            self.scales.form(module),
            self.scales.quantization.schemes[module].scheme,
            self.scales.factor(module),
        )
        assert form is not None and factor is not None, f"{module} is quantised, with a factor"
        each = 2 if form.grain is Grain.BLOCK else 1  # columns in a byte
        codes = stored_int4(block.view(np.uint8)) if each == 2 else block.view(np.uint8)
        digits = (
            np.where(codes < 8, codes.astype(np.float32), codes.astype(np.float32) - 16)
            if each == 2
            else codes.view(np.int8)
        )
        stored = self.scales.row_amax(module, tensor)[place[0] : place[0] + len(block)]
        scales = np.where(no_scales(stored, scheme), np.float32(0), stored_scales(stored, scheme))
        columns = slice(place[1] * each, (place[1] + block.shape[1]) * each)
        spread = np.repeat(scales, tensor.shape[-1] * each // stored.shape[1], axis=1)[:, columns]
        return rounded(np.ascontiguousarray(digits.astype(np.float32) * spread * factor[columns]), dtype)

    def owner(self, output: OutputTensor) -> Quantised:
        """The weight that a tensor is, or is beside."""
        return self._owners[output.file, output.index]

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
            return np.array([[self.scalar(together)]], np.float32)
        top, bottom, left, right = cells
        if form.grain is Grain.FP4:
            second = self.scalar(together)
            scales = e4m3_values(fp4_block_scales(values, second)) * second
            return np.repeat(scales, FP4_COLUMNS, axis=1)
        amax = self.scales.row_amax(module, tensor, in_order=in_order)
        if form.grain is Grain.ROW:
            return scale_of(amax[top:bottom], form.divisor)
        size = tensor.shape[-1] // amax.shape[1]
        blocks = scale_of(amax[top:bottom, left // size : -(-right // size)], form.divisor)
        spread = np.repeat(blocks, size, axis=1)
        return spread[:, left % size : left % size + right - left]

    def scalar(self, modules: Sequence[ModuleName]) -> np.float32:
        """The scale that modules share: of the largest amax."""
        form = self.scales.form(modules[0])
        assert form is not None, f"{modules[0]} is not quantised"
        if form.grain is not Grain.BLOCK and all(self.scales.is_compressed(module) for module in modules):
            return single(max(self.scales.stored_scale(module) for module in modules))
        amax = np.array([max(self.scales.weight_amax(module) for module in modules)], np.float32)
        return single(scale_of(amax, form.second or form.divisor)[0])

    def _folded(self, slab: Slab, use: Use, values: Float32, place: tuple[int, int]) -> Block:
        """A norm that has taken over the factor of the linear behind it."""
        planned, origin = use.output.planned, self._norms[slab]
        factor = self.scales.factor(behind_norm(origin))
        if factor is None:
            raise ExportError(f"{planned.name}: the linear behind it has no factor to take over")
        first = use.column + place[1] - use.source[2]
        for op in planned.values:
            step = np.float32(1 if op is ValueOp.ADD_ONE else -1)
            values = to_float32(rounded(values + step, planned.source_dtype), planned.source_dtype)
        values = to_float32(rounded(values, planned.dtype), planned.dtype)
        columns = slice(first, first + values.shape[1])
        minus_one = origin.tensor.slab.name.endswith("weight") and self._stores_gamma_minus_one(planned.values)
        offset = np.float32(1 if minus_one else 0)
        return rounded((values + offset) * factor[columns] - offset, planned.dtype)

    def _stores_gamma_minus_one(self, ops: Sequence[ValueOp]) -> bool:
        offset = -1 if self.scales.quantization.logical.config.zero_centered_norm else 0
        offset += sum(1 if op is ValueOp.ADD_ONE else -1 for op in ops)
        return offset < 0

    def companion_cells(self, weight: Quantised, kind: Kind) -> Iterator[tuple[Cells, Float32]]:
        """What a tensor beside a weight must hold: (cells of it as a matrix, float32 values), part by part."""
        name = weight.companions[kind].planned.name.rpartition(".")[2] if kind in weight.companions else ""
        for cells, values in self._companion_cells(weight, kind):
            yield cells, (np.float32(1) / values if name in RECIPROCAL else values)

    def _companion_cells(self, weight: Quantised, kind: Kind) -> Iterator[tuple[Cells, Float32]]:
        form = self.form(weight)
        assert form is not None, f"{weight.output.planned.name} cannot be recomputed"
        if kind is Kind.SHAPE:
            shape = weight.output.planned.view.shape
            if self.is_stored(weight):
                shape = (shape[0], 2 * shape[1])
            yield (0, len(shape), 0, 1), np.array(shape, np.float32)[:, None]
        elif kind is Kind.INPUT:
            yield (0, 1, 0, 1), np.array([[self._input_scale(weight)]], np.float32)
        elif kind is Kind.SECOND or (kind is Kind.SCALE and form.grain is Grain.MODULE):
            rows = int(np.prod(weight.output.planned.view.shape[:-1]))
            for number, row in enumerate(range(0, rows, weight.rows_per_slice)):
                yield (number, number + 1, 0, 1), np.array([[self.scalar(weight.modules(row))]], np.float32)
        elif kind is Kind.FACTOR:
            for _, module, use in weight.uses:
                factor = self.scales.factor(module)
                if factor is None:
                    raise ExportError(f"{module}: the checkpoint has no factor of its activations")
                each = (
                    2 if self.is_stored(weight) and form.grain in (Grain.BLOCK, Grain.FP4) else 1
                )  # columns in a byte
                left, right, column = (each * place for place in (*use.source[2:], use.column))
                number = use.row // weight.rows_per_slice
                yield (number, number + 1, column, column + right - left), factor[None, left:right]
        else:
            taken = self.taken_over(weight)
            for tensor, module, use in weight.uses:
                scheme = self.scales.quantization.schemes[module]
                amax = self.scales.row_amax(module, tensor)
                stored = scheme.scheme if scheme.compressed else None
                for cells, values in self.row_scales(tensor, use, form, amax, stored=stored):
                    yield cells, values if taken is None else values * taken[cells[0] : cells[1], None]

    def row_scales(
        self, tensor: SourceTensor, use: Use, form: Form, amax: Float32, *, stored: Scheme | None = None
    ) -> Iterator[tuple[Cells, Float32]]:
        """Scales of rows or of blocks that belong to a use. `stored`: of codes in that scheme, not amax but scales."""
        top, bottom, left, right = use.source
        first, end, column = 0, 1, 0
        if form.grain in (Grain.BLOCK, Grain.FP4):
            each = 2 if form.grain is Grain.FP4 or stored else 1  # columns in a byte, where codes are stored
            size = FP4_COLUMNS if form.grain is Grain.FP4 else tensor.shape[-1] * each // amax.shape[1]
            first, end, column = left * each // size, -(-right * each // size), use.column * each // size
        elif stored:  # the columns of a training rank have a scale of their own for each row
            first = left // (tensor.shape[-1] // amax.shape[1])
            end = first + 1
        if form.grain is Grain.FP4:  # scales, not amax
            yield (use.row, use.row + bottom - top, column, column + end - first), amax[top:bottom, first:end]
            return
        found = amax[top:bottom, first:end]
        scales = stored_scales(found, stored) if stored else scale_of(found, form.divisor)
        yield (use.row, use.row + bottom - top, column, column + end - first), scales

    def taken_over(self, weight: Quantised) -> Float32 | None:
        """``[rows]``: the factor of the activations behind a weight, where its rows take it over."""
        name = weight.output.planned.name.split(".")[-2]
        own, behind = TAKES_OVER.get(name, ("", ""))
        config = self.output.plan.config.get("quantization_config")
        is_compressed = isinstance(config, dict) and config.get("quant_method") == "compressed-tensors"
        modules = [replace(m, pattern=m.pattern.replace(own, behind)) for m in weight.modules()] if own else []
        if not is_compressed or not modules or any(module in self.plain.values() for module in modules):
            return None
        return self.scales.factor(modules[0]) if modules[0] in self.scales.quantization.schemes else None

    @property
    def taken(self) -> set[ModuleName]:
        """Linears whose factor the rows of the linear before them take over."""
        found = set[ModuleName]()
        for weight in self.weights.values():
            own, behind = TAKES_OVER.get(weight.output.planned.name.split(".")[-2], ("", ""))
            if own and self.taken_over(weight) is not None:
                found.update(replace(m, pattern=m.pattern.replace(own, behind)) for m in weight.modules())
        return found

    def _input_scale(self, weight: Quantised) -> np.float32:
        """Experts that lie in one tensor take the largest of all of the layer's, on every rank."""
        modules = list(weight.modules())
        if len(weight.output.planned.view.shape) == 3:
            experts = range(self.scales.quantization.logical.config.num_experts)
            modules = [replace(module, expert=expert) for module in modules for expert in experts]
        return single(max(self.scales.input_scale(module) for module in dict.fromkeys(modules)))

    def kv_scale(self, kind: Kind, layer: int, *, clamped: bool) -> np.float32:
        """Of the KV cache of a layer. `clamped`: at least 1, as TensorRT-LLM's FP8 scales are written."""
        quantization = self.scales.quantization
        if quantization.kv_cache_scale is not None:
            return single(quantization.kv_cache_scale)
        both = (Quantizer.KEY, Quantizer.VALUE)
        wanted = {Kind.KEY: both[:1], Kind.VALUE: both[1:]}.get(kind, both)
        amax = np.array([max(self.scales.kv_amax(layer, each) for each in wanted)], np.float32)
        fp8 = quantization.kv_cache is KvScheme.FP8
        scale = scale_of(amax, 448.0 if fp8 else 127.0)[0]
        return single(max(scale, np.float32(1))) if clamped and fp8 else np.float32(scale)


def _layer_part(name: str) -> str:
    """``transformer.layers.3.`` of a name in it; empty for others."""
    match = re.match(r".*?layers\.\d+\.", name)
    return match[0] if match else ""


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
    for own, behind in TAKES_OVER.values():
        if last == "bias" and head.endswith(own):
            return ModuleName(head.removesuffix(own) + behind, origin.place.layer, origin.place.expert)
    if not last.startswith("layer_norm_"):
        layer, _, norm = head.rpartition(".")
        head = f"{layer}.{_BEHIND.get(norm, norm)}"
    return ModuleName(head, origin.place.layer)
