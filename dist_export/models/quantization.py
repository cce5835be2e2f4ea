"""How the linears of one model are quantised, and where their numbers lie. Decided from metadata alone.

The unit is Megatron's module: a fused ``linear_qkv`` or ``linear_fc1`` has one quantiser, so query, key and value share
their scales, and so do gate and up. Logical weights find their module through the source rule that made them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from math import prod

from msgspec import Struct, field
from msgspec.structs import replace

from dist_export.checkpoint.quantizer_names import (
    ModuleName,
    Quantity,
    Quantizer,
    QuantizerTensor,
    quantizer_tensor,
)
from dist_export.checkpoint.quantizer_scheme import KvScheme, LinearScheme, Scheme
from dist_export.errors import ExportError
from dist_export.models.catalog import SourceCatalog
from dist_export.models.layout_ops import SPLIT_HALVES
from dist_export.models.logical import Located, LogicalModel
from dist_export.models.source_tensor import SourceTensor
from dist_export.tensors.boxes import Shape
from dist_export.tensors.views import Slab, View, concatenate

CORE_ATTENTION = "decoder.layers.{layer}.self_attention.core_attention"
LINEAR_QKV = "decoder.layers.{layer}.self_attention.linear_qkv"
_ROW_AMAX = "amax of rows of "


def row_slab(weight: Slab) -> Slab:
    """The name of the measured amax of a weight's rows, ``[rows, 1]`` float32: in the scale table, in no file."""
    return Slab(f"{_ROW_AMAX}{weight}")


def is_row_slab(slab: Slab) -> bool:
    """Whether a slab is one of `row_slab`."""
    return slab.name.startswith(_ROW_AMAX)


_BLOCKS = re.compile(r"^(\d+) scales per row of (.*)$")


def block_slab(stored: Slab, blocks: int) -> Slab:
    """The name of a tensor of block scales read as ``[rows, blocks x T]``, as which no file has it.

    It is stored as ``[rows x blocks, T]``: column t has the scales of training rank t's columns, row after row
    (modelopt/torch/quantization/qtensor/int4_tensor.py, `INT4QTensor.quantize`, whose flat scales
    plugins/megatron.py joins along dim 0 of column-parallel and dim 1 of row-parallel linears).
    """
    return Slab(f"{blocks} scales per row of {stored.name}", stored.prefix)


def stored_blocks(slab: Slab) -> tuple[Slab, int] | None:
    """What `block_slab` was made of; None for any other slab."""
    match = _BLOCKS.match(slab.name)
    return (Slab(match[2], slab.prefix), int(match[1])) if match else None


def kv_module(layer: int, part: str) -> ModuleName:
    """The entry of the scale table for a layer's ``key``s or ``value``s in the cache."""
    return ModuleName(f"{CORE_ATTENTION}.{part}", layer)


PER_TENSOR = {Scheme.FP8, Scheme.NVFP4, Scheme.NVFP4_AWQ, Scheme.W4A16_NVFP4, Scheme.W4A8_AWQ}
"""Schemes whose weights have one scale for the whole module (W4A8: its second level)."""
PER_ROW = {Scheme.FP8_PER_CHANNEL_PER_TOKEN, Scheme.INT8_SQ}
PER_BLOCK = {Scheme.INT4_AWQ, Scheme.W4A8_AWQ}
STATIC_INPUT = {Scheme.FP8, Scheme.INT8_SQ, Scheme.W4A8_AWQ, Scheme.NVFP4, Scheme.NVFP4_AWQ}
"""Schemes in which activations have a scale of their own."""
WEIGHT_ONLY = {Scheme.INT8_WO, Scheme.INT4_WO}
"""Schemes of which a checkpoint keeps nothing: whoever serves it quantises the weights."""
SUPPORTED = PER_TENSOR | PER_ROW | PER_BLOCK | WEIGHT_ONLY


class QuantizerTensors(Struct, frozen=True):
    """The quantisers' tensors of a checkpoint and of a calibration file, by module."""

    catalog: SourceCatalog
    num_chunks: Callable[[str], int]
    """Chunks that a stored tensor consists of: for row-parallel order, the training's tp size."""
    of_all_experts: Mapping[tuple[str, int], SourceTensor] = field(default_factory=dict)
    """Folded name and layer -> what all experts of a grouped linear have together."""

    @classmethod
    def of(cls, tensors: Mapping[str, tuple[Shape, str]], num_chunks: Callable[[str], int]) -> QuantizerTensors:
        """Those among `tensors` (global name -> shape and dtype)."""
        own, common = {}, {}
        for name, (shape, dtype) in tensors.items():
            found = quantizer_tensor(name)
            if found is not None and _is_of_all_experts(found, shape):
                assert found.quantity is not None
                pattern = _pattern(found.module, found.quantizer, found.quantity, found.number)
                common[pattern, found.module.layer] = SourceTensor(Slab(name), shape, dtype)
            elif found is not None:
                own[name] = (shape, dtype)
        return cls(SourceCatalog(own), num_chunks, common)

    @property
    def names(self) -> set[str]:
        """The stored tensors among them."""
        return {*self.catalog.tensors, *(each.slab.name for each in self.of_all_experts.values())}

    def find(
        self, module: ModuleName, quantizer: Quantizer, quantity: Quantity, number: int | None = None
    ) -> SourceTensor | None:
        """A module's tensor, None where there is none."""
        pattern = _pattern(module, quantizer, quantity, number)
        found = self.catalog.find(pattern, layer=module.layer, expert=module.expert)
        return found or self.of_all_experts.get((pattern, module.layer))


def _pattern(module: ModuleName, quantizer: Quantizer, quantity: Quantity, number: int | None) -> str:
    """The folded name of a quantiser's tensor."""
    place = "" if number is None else f".{number}"
    return f"{module.pattern}.{quantizer.value}{place}.{quantity.value}"


def _is_of_all_experts(tensor: QuantizerTensor, shape: Shape) -> bool:
    """Whether a tensor without an expert's number is not stacked over experts: a grouped linear has one input, and
    until ModelOpt 0.41 one quantiser of its weights (modelopt/torch/quantization/plugins/megatron.py)."""
    if "{expert}" not in tensor.module.pattern or tensor.module.expert >= 0 or tensor.quantity is None:
        return False
    return tensor.quantizer is Quantizer.INPUT or prod(shape) == 1


class Quantization(Struct, frozen=True, eq=False):
    """Everything an export must know to quantise, but the numbers themselves."""

    schemes: Mapping[ModuleName, LinearScheme]
    """Every quantised module; others keep their element type."""
    logical: LogicalModel
    tensors: QuantizerTensors
    origin: str
    """Who decided: ``ModelOpt 0.47.0 (max)``, ``--quantization fp8``."""
    input_scales: Mapping[ModuleName, float] = field(default_factory=dict)
    """Dequantisation scales (amax / 448) of activations that TransformerEngine's state gives."""
    kv_cache: KvScheme = KvScheme.NONE
    kv_cache_scale: float | None = None
    """Of every layer, as the user gave it; None: the checkpoint's."""
    notes: tuple[str, ...] = ()
    """What the user should know."""

    @property
    def overall(self) -> Scheme:
        """The scheme of the model, `Scheme.MIXED` where modules differ."""
        kinds = {each.scheme for each in self.schemes.values()}
        return Scheme.NONE if not kinds else kinds.pop() if len(kinds) == 1 else Scheme.MIXED

    def module_of(self, logical: str, *, layer: int, expert: int) -> ModuleName | None:
        """The module that holds a logical weight; None where the checkpoint has none, or it is no module's."""
        located = self.logical.locate(logical, layer=layer, expert=expert)
        return None if located is None else module_of(located, layer=layer, expert=expert)

    def scheme(self, module: ModuleName | None) -> LinearScheme | None:
        """How a module is quantised; None where it is not."""
        return None if module is None else self.schemes.get(module)

    def amax(self, logical: str, module: ModuleName, *, level: int | None = None) -> tuple[View, str] | None:
        """The stored amax of a logical weight, ``[rows, 1]`` or ``[rows, blocks]`` in the order of its rows, and its
        element type. None where the checkpoint stores none. `level`: of quantisers that follow each other.

        Raises `ExportError` for shapes that do not belong to the weight.
        """
        found = self.tensors.find(module, Quantizer.WEIGHT, Quantity.AMAX, level)
        located = self.logical.locate(logical, layer=module.layer, expert=module.expert)
        if found is None or located is None:
            return None
        return self._rows_of(found, located), found.dtype

    def stored_scales(self, logical: str, module: ModuleName) -> tuple[View, str]:
        """The scales of a weight that is stored quantised, ``[rows, blocks]`` in the order of its rows, and their type.

        Raises `ExportError` where the checkpoint has none.
        """
        found, located = self._found_scales(logical, module, None)
        return self._rows_of(found, located), found.dtype

    def stored_block_scales(
        self, logical: str, module: ModuleName, size: int, *, level: int | None
    ) -> tuple[View, str]:
        """The same of INT4 in blocks of `size` columns, which are reciprocals and stored one after the other."""
        found, located = self._found_scales(logical, module, level)
        halves = 1 if located.rule.source.endswith(".weight") else 2
        rows, columns = located.source.shape[-2] * halves, located.source.shape[-1] * 2  # two columns in a byte
        num_scales, parts = found.shape if len(found.shape) == 2 else (prod(found.shape), 1)
        if num_scales % rows or num_scales // rows * parts * size != columns:
            raise ExportError(
                f"{found.slab}: {list(found.shape)} scales do not belong to {rows} rows of {columns} columns in blocks "
                f"of {size}"
            )
        blocks = num_scales // rows
        whole = SourceTensor(block_slab(found.slab, blocks), (rows, blocks * parts), found.dtype)
        return self._rows_of(whole, located, stored_as=found), found.dtype

    def _found_scales(self, logical: str, module: ModuleName, level: int | None) -> tuple[SourceTensor, Located]:
        found = self.tensors.find(module, Quantizer.WEIGHT, Quantity.SCALE, level)
        located = self.logical.locate(logical, layer=module.layer, expert=module.expert)
        if found is None or located is None:
            raise ExportError(f"{module}: its weight is stored quantised, but its {Quantity.SCALE.value} is missing")
        return found, located

    def measured_rows(self, logical: str, module: ModuleName) -> View:
        """``[rows, 1]``: the amax of each row of a logical weight, which the scale phase measures (`row_slab`)."""
        located = self.logical.locate(logical, layer=module.layer, expert=module.expert)
        assert located is not None, f"{logical} is in the checkpoint"
        view = View.of(row_slab(located.source.slab), (located.source.shape[0], 1))
        return located.rule.op.split(view, self.logical.config.of_layer(module.layer))[located.part]

    def is_measured(self, module: ModuleName) -> bool:
        """Whether the scale of each row has to be found: the checkpoint stores no amax of the weight."""
        scheme = self.schemes[module].scheme
        return scheme in PER_ROW and self.tensors.find(module, Quantizer.WEIGHT, Quantity.AMAX) is None

    def pre_quant_scale(self, module: ModuleName) -> SourceTensor | None:
        """``[in]``: what activations are multiplied by; None where the checkpoint has none."""
        return self.tensors.find(module, Quantizer.INPUT, Quantity.PRE_QUANT_SCALE)

    def smoothing(self, module: ModuleName) -> SourceTensor | None:
        """``[in]``: what the weight's columns are to be divided by; None where they are stored as they are served."""
        return self.tensors.find(module, Quantizer.INPUT, Quantity.SMOOTHING)

    def experts_of(self, module: ModuleName) -> list[ModuleName]:
        """The quantised modules that are this one of the layer's other experts, and itself."""
        if "{expert}" not in module.pattern:
            return [module]
        experts = (replace(module, expert=expert) for expert in range(self.logical.config.num_experts))
        return [each for each in experts if each in self.schemes]

    def _rows_of(self, amax: SourceTensor, located: Located, *, stored_as: SourceTensor | None = None) -> View:
        view, config = View.of(amax.slab, amax.shape), self.logical.config
        rule, source = located.rule, located.source
        module, _, last = rule.source.rpartition(".")
        if module.endswith(".linear_fc1") and last in WEIGHT_NAMES and config.gated:
            view = _in_gate_up_order(view, self.tensors.num_chunks((stored_as or amax).slab.name))
            if not rule.source.endswith(".weight"):
                part = SPLIT_HALVES.split(view, config)[rule.source.endswith("_v")]
                return _checked(part, source, amax)
        return _checked(rule.op.split(view, config)[located.part], None, amax)

    def kv_amax(self, layer: int) -> tuple[SourceTensor | None, SourceTensor | None]:
        """Amax of a layer's keys and of its values; None where the checkpoint has none.

        ModelOpt before 0.40 has that of the whole output of linear_qkv instead, which then stands for both.
        """
        module = ModuleName(CORE_ATTENTION, layer)
        key, value = (self.tensors.find(module, each, Quantity.AMAX) for each in (Quantizer.KEY, Quantizer.VALUE))
        if key is None and value is None:
            key = value = self.tensors.find(ModuleName(LINEAR_QKV, layer), Quantizer.OUTPUT, Quantity.AMAX)
        return key, value

    def modules(self) -> Iterator[ModuleName]:
        """The quantised modules in a fixed order."""
        yield from sorted(self.schemes, key=lambda each: (each.layer, each.pattern, each.expert))


WEIGHT_NAMES = ("weight", "weight_w", "weight_v")
"""Of a linear: whole, or the two halves of a gated one."""


def is_linear(module: str) -> bool:
    """Whether a module (by its folded name) is a linear of a transformer layer that may be quantised: no router."""
    return module.startswith("decoder.layers.{layer}.") and module.rpartition(".")[2].startswith("linear_")


def module_of(located: Located, *, layer: int, expert: int) -> ModuleName | None:
    """The module whose weight a rule takes: its name without ``.weight``. None for norms and biases inside modules."""
    pattern, _, last = located.rule.source.rpartition(".")
    if last not in WEIGHT_NAMES:
        return None
    return ModuleName(pattern, layer if "{layer}" in pattern else -1, expert if "{expert}" in pattern else -1)


def _in_gate_up_order(view: View, num_ranks: int) -> View:
    """Rows of a gated fc1's amax in the order gate, up.

    ModelOpt saves them in the order in which training ranks held them (rank 0's gate, its up, rank 1's gate, …), since
    the factory that reorders the weight does not know the amax (modelopt/torch/quantization/plugins/megatron.py).
    """
    rows = view.shape[0]
    if num_ranks == 1:
        return view
    if rows % (2 * num_ranks):
        raise ExportError(f"amax of a gated fc1 has {rows} rows in {num_ranks} chunks, which cannot be halved")
    half = rows // 2 // num_ranks
    order = [(rank * 2 + part) * half for part in (0, 1) for rank in range(num_ranks)]
    return concatenate([view.narrow(0, start, half) for start in order], 0)


def _checked(view: View, weight: SourceTensor | None, amax: SourceTensor) -> View:
    if weight is not None and view.shape[0] != weight.shape[0]:
        raise ExportError(f"{amax.slab}: {view.shape[0]} rows for the {weight.shape[0]} of {weight.slab}")
    return view


def unpacked_shapes(catalog: SourceCatalog) -> dict[str, Shape]:
    """Folded name -> shape of one layer, as the model has it: linears stored as FP4 keep two columns in a byte."""
    found = catalog.folded_shapes()
    for name, shape in found.items():
        module, _, last = name.rpartition(".")
        if last in WEIGHT_NAMES and is_linear(module) and catalog.dtype(name) == "uint8":
            found[name] = (*shape[:-1], 2 * shape[-1])
    return found
