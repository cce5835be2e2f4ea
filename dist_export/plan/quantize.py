"""From a planned weight to its codes and scales: what a target writes for a linear of each quantisation scheme.

Which tensors there are is the same for all targets; what they are called and how scalars are shaped is the target's
dialect.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from enum import Enum

from msgspec import Struct
from msgspec.structs import replace

from dist_export.checkpoint.quantizer_names import ModuleName, Quantity, Quantizer
from dist_export.checkpoint.quantizer_scheme import LinearScheme, Scheme
from dist_export.errors import ExportError
from dist_export.models.quantization import PER_ROW, WEIGHT_ONLY, Quantization
from dist_export.models.shard_ops import Slice, TensorParallel
from dist_export.plan.recipes import (
    Codes,
    Encoded,
    Folded,
    Groups,
    Recipe,
    Scalars,
    ScaleForm,
    Smoothing,
    Stored,
    StoredScales,
    TableScales,
)
from dist_export.plan.shard import Part, PlannedTensor, Resolved
from dist_export.tensors.boxes import Shape
from dist_export.tensors.dtypes import FLOAT8_E4M3, FLOAT32, INT8, UINT8, DType, dtype_by_name
from dist_export.tensors.views import View

FP8_MAX, NVFP4_MAX, INT8_MAX, INT4_MAX = 448.0, 6.0 * 448.0, 127.0, 7.0
"""Largest code of a format: what amax is divided by. INT4 is symmetric to 7 although -8 exists."""

FP4 = (Scheme.NVFP4, Scheme.NVFP4_AWQ, Scheme.W4A16_NVFP4)
AWQ = (Scheme.INT4_AWQ, Scheme.W4A8_AWQ)


_AS_STORED = {
    Codes.E4M3: Codes.STORED_E4M3,
    Codes.INT8: Codes.STORED_INT8,
    Codes.INT4: Codes.STORED_INT4,
}
"""Codes of weights -> the same of a checkpoint that stores them."""


class Role(Enum):
    """A tensor of a quantised linear beside its codes."""

    WEIGHT_SCALE = "scale of the whole weight, or of its blocks"
    ROW_SCALE = "scale of each row"
    WEIGHT_SCALE_2 = "scale of the block scales, or second level"
    INPUT_SCALE = "scale of the activations"
    PRE_QUANT_SCALE = "what activations are multiplied by first"


class Dialect(Struct, frozen=True):
    """How a target names and shapes what belongs to a quantised linear."""

    names: Mapping[Scheme, Mapping[Role, str]]
    """Scheme -> role -> last part of the name; a role that is missing is not written. Schemes that are missing cannot
    be expressed."""
    scalar_shape: Callable[[Scheme], Shape]
    """Of the scale of one weight, and of activations."""
    expert_scalars: Callable[[Scheme, int], Shape]
    """Of the scales of so many experts' weights in one tensor."""
    int4_dtype: DType
    more: Callable[[PlannedTensor, Resolved, Quantization], Iterator[PlannedTensor]]
    """What else goes beside a tensor: scales of the KV cache."""
    folds_factor: Callable[[Scheme, str], bool] = lambda scheme, logical: False
    """Whether the norm before a logical weight takes over its factor, so that the linear has none."""


NORM_OF = {
    "attention.query.weight": "attention.norm",
    "mlp.gate.weight": "mlp.norm",
    "mlp.up.weight": "mlp.norm",
}
"""Logical weight -> the norm whose output is its input."""


class LinearQuantizer(Struct, frozen=True):
    """Quantises the weights of a target as the model's `Quantization` says."""

    quantization: Quantization
    dialect: Dialect

    def tensors(self, planned: PlannedTensor, resolved: Resolved) -> list[PlannedTensor]:
        """The weight's codes and its scales, or the tensor as it is. Raises `ExportError`."""
        return [*self._linear(planned, resolved), *self.dialect.more(planned, resolved, self.quantization)]

    def _linear(self, planned: PlannedTensor, resolved: Resolved) -> list[PlannedTensor]:
        modules = self._modules(resolved)
        schemes = {self.quantization.scheme(module) for group in modules for module in group}
        if schemes <= {None}:
            return [self._norm(planned, resolved)]
        if len(schemes) > 1:
            raise ExportError(f"its parts are quantised differently: {', '.join(sorted(map(_named, schemes)))}")
        scheme = schemes.pop()
        assert scheme is not None
        if scheme.scheme in WEIGHT_ONLY and scheme.scheme in self.dialect.names:
            return [planned]
        if scheme.scheme not in self.dialect.names:
            raise ExportError(f"the target has no form for {scheme.scheme.value}")
        if planned.transposed or planned.values:
            raise ExportError("a weight that is transposed or computed cannot be quantised")
        made = list(_Linear(self, planned, resolved, modules, scheme).tensors())
        recipes = [each.recipe for each in made if isinstance(each.recipe, Encoded)]
        faults = [fault for recipe in recipes for fault in recipe.faults(planned.view.shape)]
        if faults:
            raise ExportError(f"{scheme.scheme.value} of weights {list(planned.view.shape)}: {'; '.join(faults)}")
        return made

    def _modules(self, resolved: Resolved) -> Groups:
        """The modules of each slice; empty where the tensor is no weight of a module."""
        if not resolved.name.endswith("weight"):
            return ()
        found = []
        for parts in resolved.slices:
            names = [self._module(part, resolved.layer) for part in parts]
            found.append(tuple(dict.fromkeys(name for name in names if name is not None)))
        return tuple(found)

    def _module(self, part: Part, layer: int) -> ModuleName | None:
        return self.quantization.module_of(part.input.logical, layer=layer, expert=part.expert)

    def _norm(self, planned: PlannedTensor, resolved: Resolved) -> PlannedTensor:
        """A norm that takes over the factor of the linears behind it; anything else as it is."""
        logical, _, kind = resolved.slices[0][0].input.logical.rpartition(".")
        for weight, norm in NORM_OF.items():
            if not logical.endswith(norm):
                continue
            module = self.quantization.module_of(f"layers.{{layer}}.{weight}", layer=resolved.layer, expert=-1)
            scheme = self.quantization.scheme(module)
            if module is None or scheme is None or not self.dialect.folds_factor(scheme.scheme, weight):
                continue
            factor = self.quantization.pre_quant_scale(module)
            if factor is not None:
                view = View.of(factor.slab, factor.shape)
                zero_centered = kind == "weight" and self.stores_gamma_minus_one(planned)
                return replace(planned, recipe=Folded(view, dtype_by_name(factor.dtype), zero_centered))
        return planned

    def stores_gamma_minus_one(self, planned: PlannedTensor) -> bool:
        """Whether what the target stores of a norm is gamma - 1, after the plan's value operations."""
        from dist_export.models.value_ops import ValueOp

        change = sum({ValueOp.ADD_ONE: 1, ValueOp.SUBTRACT_ONE: -1}.get(op, 0) for op in planned.values)
        return (change - 1 if self.quantization.logical.config.zero_centered_norm else change) < 0


class _Linear(Struct, frozen=True):
    """One quantised target weight."""

    quantizer: LinearQuantizer
    planned: PlannedTensor
    resolved: Resolved
    modules: Groups
    linear: LinearScheme

    def tensors(self) -> Iterator[PlannedTensor]:
        scheme = self.linear.scheme
        if scheme is Scheme.FP8:
            yield from self._per_tensor(Codes.E4M3, FLOAT8_E4M3, FP8_MAX, FP8_MAX)
        elif scheme is Scheme.FP8_PER_CHANNEL_PER_TOKEN:
            yield from self._per_row(Codes.E4M3, FLOAT8_E4M3, FP8_MAX)
        elif scheme is Scheme.INT8_SQ:
            yield from self._per_row(Codes.INT8, INT8, INT8_MAX)
            yield from self._input_scale(INT8_MAX)
            yield from self._factor()
        elif scheme in AWQ:
            yield from self._per_block()
            if scheme is Scheme.W4A8_AWQ:
                yield from self._weight_scalar(Role.WEIGHT_SCALE_2, FP8_MAX)
                yield from self._input_scale(FP8_MAX)
            yield from self._factor()
        elif scheme in FP4:
            yield from self._fp4()
        else:
            raise ExportError(f"{scheme.value} cannot be written yet")

    def _per_tensor(self, codes: Codes, dtype: DType, divisor: float, input_divisor: float) -> Iterator[PlannedTensor]:
        yield self._codes(codes, dtype, TableScales(self.modules, divisor))
        yield from self._weight_scalar(Role.WEIGHT_SCALE, divisor)
        yield from self._input_scale(input_divisor)

    def _per_row(self, codes: Codes, dtype: DType, divisor: float) -> Iterator[PlannedTensor]:
        if self.linear.compressed:
            yield from self._stored_per_row(codes, dtype)
            return
        view, amax_dtype = self._stored(self._row_amax)
        if view.shape[-1] != 1:
            raise ExportError(f"its amax is {list(view.shape)}, expected one per row")
        yield self._codes(codes, dtype, StoredScales(view, amax_dtype, divisor))
        yield from self._small(Role.ROW_SCALE, Stored(view, amax_dtype, divisor, squeezed=True), FLOAT32)

    def _stored_per_row(self, codes: Codes, dtype: DType) -> Iterator[PlannedTensor]:
        """Of a weight that is stored as codes. Each training rank of a row-parallel linear has a scale of its own for
        a row; ModelOpt makes those of FP8 equal (the amax is shared), which is checked as the codes are read."""
        view, scale_dtype = self._stored(self._row_scale)
        if view.shape[-1] > 1 and codes is Codes.INT8:
            raise ExportError(
                f"ModelOpt quantised the columns of its {view.shape[-1]} training ranks by scales of their own, and a "
                "row has one place for a scale; export with a tp size that is a multiple of training's"
            )
        yield self._codes(codes, dtype, StoredScales(view, scale_dtype, 1.0, ScaleForm.SCALE))
        scale = Stored(view.narrow(-1 % len(view.shape), 0, 1), scale_dtype, None, squeezed=True, form=ScaleForm.SCALE)
        yield from self._small(Role.ROW_SCALE, scale, FLOAT32)

    def _per_block(self) -> Iterator[PlannedTensor]:
        if self.linear.compressed:
            view, dtype = self._stored(self._block_scale)
            scales = StoredScales(view, dtype, 1.0, ScaleForm.RECIPROCAL)
            yield self._codes(Codes.INT4, self.quantizer.dialect.int4_dtype, scales)
            yield from self._small(Role.WEIGHT_SCALE, Stored(view, dtype, None, form=scales.form), FLOAT32)
            return
        view, amax_dtype = self._stored(self._block_amax)
        size, columns = self.linear.group_size or 128, self.planned.view.shape[-1]
        if view.shape[-1] * size != columns:
            raise ExportError(
                f"{columns} columns on a rank do not divide into the amax's blocks of {size}; choose a smaller tp"
            )
        yield self._codes(Codes.INT4, self.quantizer.dialect.int4_dtype, StoredScales(view, amax_dtype, INT4_MAX))
        yield from self._small(Role.WEIGHT_SCALE, Stored(view, amax_dtype, INT4_MAX), FLOAT32)

    def _fp4(self) -> Iterator[PlannedTensor]:
        size = self.linear.group_size or Codes.E2M1_SCALES.columns
        if size != Codes.E2M1_SCALES.columns:
            raise ExportError(f"FP4 in blocks of {size}, where blocks of {Codes.E2M1_SCALES.columns} are known")
        columns = self.planned.view.shape[-1] * (2 if self.linear.compressed else 1)
        if columns % size:
            raise ExportError(f"{columns} columns do not divide into blocks of {size}")
        scales = TableScales(self.modules, NVFP4_MAX)
        yield self._codes(Codes.E2M1, UINT8, scales)
        name = self._name(Role.WEIGHT_SCALE)
        assert name is not None, "block scales are always written"
        if self.linear.compressed:
            view, dtype = self._stored(self.quantizer.quantization.stored_scales)
            yield from self._small(Role.WEIGHT_SCALE, Stored(view, dtype, None), FLOAT8_E4M3)
        else:
            recipe = Encoded(Codes.E2M1_SCALES, scales, self._smoothing())
            yield replace(self.planned, name=name, dtype=FLOAT8_E4M3, recipe=recipe)
        yield from self._weight_scalar(Role.WEIGHT_SCALE_2, NVFP4_MAX)
        if self.linear.scheme is not Scheme.W4A16_NVFP4:
            yield from self._input_scale(NVFP4_MAX)
        yield from self._factor()

    def _codes(self, codes: Codes, dtype: DType, scales: TableScales | StoredScales) -> PlannedTensor:
        if self.linear.compressed:
            found, expected = self.planned.source_dtype, UINT8 if codes is Codes.INT4 else dtype
            if found != expected:
                raise ExportError(f"its weight is stored as {found}, expected {expected} codes")
            if codes is Codes.E2M1:  # has no code that is not a number
                return replace(self.planned, dtype=dtype)
            return replace(self.planned, dtype=dtype, recipe=Encoded(_AS_STORED[codes], scales))
        return replace(self.planned, dtype=dtype, recipe=Encoded(codes, scales, self._smoothing()))

    def _weight_scalar(self, role: Role, divisor: float) -> Iterator[PlannedTensor]:
        dialect, scheme = self.quantizer.dialect, self.linear.scheme
        shape = dialect.scalar_shape(scheme)
        if self.resolved.rule.over_experts:
            shape = dialect.expert_scalars(scheme, len(self.modules))
        yield from self._small(role, Scalars(self.modules, divisor, shape), FLOAT32)

    def _input_scale(self, divisor: float) -> Iterator[PlannedTensor]:
        """One for the tensor: experts in one tensor share the largest of all experts of the layer, on every rank."""
        group = tuple(dict.fromkeys(module for modules in self.modules for module in modules))
        if self.resolved.rule.over_experts:
            num_experts = self.quantizer.quantization.logical.config.num_experts
            group = tuple(dict.fromkeys(replace(m, expert=e) for m in group for e in range(num_experts)))
        shape = self.quantizer.dialect.scalar_shape(self.linear.scheme)
        yield from self._small(Role.INPUT_SCALE, Scalars((group,), divisor, shape, of_inputs=True), FLOAT32)

    def _factor(self) -> Iterator[PlannedTensor]:
        """The factor of the activations, cut along with the weight's columns."""
        name = self._name(Role.PRE_QUANT_SCALE)
        required = bool(self.linear.pre_quant_scale) or (name is not None and self.linear.scheme in AWQ)
        found = self._of_columns(Quantity.PRE_QUANT_SCALE, required=required)
        if found is None:
            return
        logical = self.resolved.slices[0][0].input.logical.removeprefix("layers.{layer}.")
        if name is None or self.quantizer.dialect.folds_factor(self.linear.scheme, _fused_name(logical)):
            return
        yield from self._small(Role.PRE_QUANT_SCALE, Stored(*found, None), self._factor_dtype())

    def _smoothing(self) -> Smoothing | None:
        """What the weights are still to be divided by."""
        found = self._of_columns(Quantity.SMOOTHING, required=False)
        return None if found is None else Smoothing(*found)

    def _of_columns(self, quantity: Quantity, *, required: bool) -> tuple[View, DType] | None:
        """A tensor ``[in]`` of the input's quantiser, cut like the weight's columns; ``[slices, in]`` where experts are
        stacked. None where no slice has one."""
        quantization = self.quantizer.quantization
        views, found = [], None
        for parts, modules in zip(self.resolved.slices, self.modules, strict=True):
            tensors = [quantization.tensors.find(module, Quantizer.INPUT, quantity) for module in modules]
            if len(tensors) != 1:
                raise ExportError("its parts have inputs of different factors")
            if tensors[0] is None:
                if required or found is not None:
                    raise ExportError(f"{modules[0]}: the checkpoint has no {quantity.value} of its input quantizer")
                continue
            found = tensors[0]
            view = View.of(found.slab, found.shape)
            shard = parts[0].input.shard
            if isinstance(shard, Slice) and shard.dim == 1:
                view = Slice(0).take(view, self.resolved.tp, quantization.logical.config)
            views.append([view])
        return None if found is None else (self.resolved.joined(views), dtype_by_name(found.dtype))

    def _factor_dtype(self) -> DType:
        """The export's own: activations are multiplied in it."""
        return self.planned.dtype

    def _block_amax(self, logical: str, module: ModuleName) -> tuple[View, str]:
        level = 0 if self.linear.scheme is Scheme.W4A8_AWQ else None
        found = self.quantizer.quantization.amax(logical, module, level=level)
        if found is None:
            raise ExportError(f"{module}: {self.linear.scheme.value} needs the amax of its weight and there is none")
        return found

    def _block_scale(self, logical: str, module: ModuleName) -> tuple[View, str]:
        quantization, size = self.quantizer.quantization, self.linear.group_size or 128
        level = 0 if self.linear.scheme is Scheme.W4A8_AWQ else None
        return quantization.stored_block_scales(logical, module, size, level=level)

    def _row_scale(self, logical: str, module: ModuleName) -> tuple[View, str]:
        return self.quantizer.quantization.stored_scales(logical, module)

    def _row_amax(self, logical: str, module: ModuleName) -> tuple[View, str]:
        quantization = self.quantizer.quantization
        if quantization.is_measured(module):
            return quantization.measured_rows(logical, module), FLOAT32.name
        return self._block_amax(logical, module)

    def _stored(self, rows_of: Callable[[str, ModuleName], tuple[View, str]]) -> tuple[View, DType]:
        """What is stored or measured for the rows of the weights (`rows_of` one logical weight), cut like the tensor.

        One value per row is not divided where ranks share the rows: each has the whole row's.
        """
        config, dtypes, slices = self.quantizer.quantization.logical.config, set(), []
        for parts in self.resolved.slices:
            views = []
            for part in parts:
                module = self.quantizer._module(part, self.resolved.layer)
                assert module is not None, f"{part.input.logical} has a module"
                view, dtype = rows_of(part.input.logical, module)
                dtypes.add(dtype)
                shard, by_row = part.input.shard, self.linear.scheme in PER_ROW or view.shape[-1] == 1
                if by_row and part.tensor.view.shape[-1] != 1 and isinstance(shard, Slice) and shard.dim == 1:
                    view = _for_columns(view, self.resolved.tp)
                else:
                    view = shard.take(view, self.resolved.tp, config)
                views.append(view)
            slices.append(views)
        if len(dtypes) > 1:
            raise ExportError(f"amax of its parts has element types {', '.join(sorted(dtypes))}")
        return self.resolved.joined(slices), dtype_by_name(dtypes.pop())

    def _small(self, role: Role, recipe: Recipe, dtype: DType) -> Iterator[PlannedTensor]:
        name = self._name(role)
        if name is None:
            return
        view = recipe.view if isinstance(recipe, Stored) else View.zeros(recipe.stored_shape(()))
        yield PlannedTensor(name, dtype, view, recipe.dtype if isinstance(recipe, Stored) else dtype, (), recipe=recipe)

    def _name(self, role: Role) -> str | None:
        last = self.quantizer.dialect.names[self.linear.scheme].get(role)
        return None if last is None else f"{self.planned.name.removesuffix('weight')}{last}"


def _for_columns(view: View, tp: TensorParallel) -> View:
    """The scales of rows ``[rows, T]`` for one rank's share of the columns, of which T training ranks had a T-th each.

    One for all columns serves every rank.
    """
    num_parts = view.shape[-1]
    if num_parts % tp.size and tp.size % num_parts:
        raise ExportError(f"{num_parts} training ranks' columns do not divide into {tp.size}; choose another tp size")
    return view.narrow(1, tp.rank * num_parts // tp.size, max(num_parts // tp.size, 1))


def _fused_name(logical: str) -> str:
    """Query stands for key and value, whose input is the same."""
    return {"attention.key.weight": "attention.query.weight", "attention.value.weight": "attention.query.weight"}.get(
        logical, logical
    )


def _named(scheme: LinearScheme | None) -> str:
    return "not at all" if scheme is None else scheme.scheme.value
