"""Quantised linears in the compressed-tensors layout, which vLLM reads.

Sources: compressed_tensors/compressors (pack_quantized, nvfp4, naive_quantized), compressed_tensors/quantization
(`QuantizationConfig`), and vllm/model_executor/layers/quantization/compressed_tensors.

The layout has no place for a factor of activations. Those of query, key and value and of gate and up go into the norm
in front; that of attention's output into the rows of value where every query head has its own value head; that of down
into the rows of up. A linear whose factor has no such place keeps its precision: its columns take the factor.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from msgspec import Struct
from msgspec.structs import replace

from dist_export.checkpoint.quantizer_names import ModuleName
from dist_export.checkpoint.quantizer_scheme import KvScheme, Scheme
from dist_export.errors import ExportError
from dist_export.models.quantization import Quantization, kv_module
from dist_export.models.source_tensor import SourceTensor
from dist_export.plan.quantize import FP4, FP8_MAX, Dialect, LinearQuantizer, Role
from dist_export.plan.recipes import Codes, Constant, Encoded, Factors, Folded, Recipe, Scalars, Stored
from dist_export.plan.shard import PlannedTensor, Resolved
from dist_export.tensors.dtypes import FLOAT32, INT32, INT64, UINT8, dtype_by_name
from dist_export.tensors.views import View

_SCALES = {Role.WEIGHT_SCALE: "weight_scale", Role.ROW_SCALE: "weight_scale", Role.INPUT_SCALE: "input_scale"}
_FP4_SCALES = {
    Role.WEIGHT_SCALE: "weight_scale",
    Role.WEIGHT_SCALE_2: "weight_global_scale",
    Role.INPUT_SCALE: "input_global_scale",
}
FORMATS = {
    Scheme.FP8: "float-quantized",
    Scheme.FP8_PER_CHANNEL_PER_TOKEN: "float-quantized",
    Scheme.INT8_SQ: "int-quantized",
    Scheme.INT4_AWQ: "pack-quantized",
    Scheme.NVFP4: "nvfp4-pack-quantized",
    Scheme.NVFP4_AWQ: "nvfp4-pack-quantized",
    Scheme.W4A16_NVFP4: "nvfp4-pack-quantized",
}
"""Schemes that the layout has a form for, and its name."""
SMOOTHED = (Scheme.INT8_SQ, Scheme.INT4_AWQ, Scheme.NVFP4_AWQ)
"""Of these the activations have factors."""
_QKV_AND_GATE_UP = ("attention.query.weight", "mlp.gate.weight", "mlp.up.weight")
_TAKES = {"attention.value": "attention.output", "mlp.up": "mlp.down", "experts.{expert}.up": "experts.{expert}.down"}
"""Linear -> the linear behind it whose factor its rows can take over."""


def kv_cache_tensors(planned: PlannedTensor, resolved: Resolved, quantization: Quantization) -> Iterator[PlannedTensor]:
    """``k_scale`` and ``v_scale`` of the attention module, amax / 448."""
    if quantization.kv_cache is not KvScheme.FP8:
        return
    for part, name in (("key", "k"), ("value", "v")):
        head, found, _ = planned.name.rpartition(f"{name}_proj.weight")
        if found:
            recipe: Recipe = Scalars(((kv_module(resolved.layer, part),),), FP8_MAX, (1,), of_inputs=True)
            if quantization.kv_cache_scale is not None:
                recipe = Constant((quantization.kv_cache_scale,), (1,))
            yield PlannedTensor(f"{head}{name}_scale", FLOAT32, View.zeros((1,)), FLOAT32, (), recipe=recipe)


DIALECT = Dialect(
    names={scheme: _FP4_SCALES if scheme in FP4 else _SCALES for scheme in FORMATS},
    scalar_shape=lambda scheme: (1,),
    expert_scalars=lambda scheme, num_experts: (num_experts,),
    int4_dtype=INT32,
    folds_factor=lambda scheme, logical: scheme in SMOOTHED and logical in _QKV_AND_GATE_UP,
    more=kv_cache_tensors,
)


class CompressedTensorsQuantizer(Struct, frozen=True):
    """Quantises the weights of a Hugging Face folder in this layout."""

    quantization: Quantization

    def tensors(self, planned: PlannedTensor, resolved: Resolved) -> list[PlannedTensor]:
        """The weight's codes and its scales, or the tensor as it is. Raises `ExportError`."""
        linear = LinearQuantizer(self.quantization, DIALECT)
        module, scheme = self._scheme(resolved)
        taken = self._taken(resolved)
        if module is None or scheme is None:
            if taken is not None and resolved.name.endswith("bias"):
                return [replace(planned, recipe=Folded(taken.view, taken.dtype))]
            return linear.tensors(planned, resolved)
        if self.keeps_precision(module):
            factor = self._factor(module)
            assert factor is not None, "its factor has no place"
            if self.quantization.schemes[module].compressed:
                plain = _out_of_codes(planned, linear.tensors(planned, resolved), factor)
                return [plain, *kv_cache_tensors(planned, resolved, self.quantization)]
            smoothed = self.quantization.smoothing(module) is None
            plain = replace(planned, recipe=Encoded(Codes.WEIGHTS, factor)) if smoothed else planned
            return [plain, *kv_cache_tensors(planned, resolved, self.quantization)]
        made = [self._in_format(each, planned, scheme, taken) for each in linear.tensors(planned, resolved)]
        if scheme is Scheme.INT4_AWQ:
            rows, columns = planned.view.shape
            shape = Constant((rows, columns * (2 if planned.source_dtype == UINT8 else 1)), (2,))
            name = planned.name.removesuffix("weight") + "weight_shape"
            made.append(PlannedTensor(name, INT64, View.zeros((2,)), INT64, (), recipe=shape))
        return made

    def keeps_precision(self, module: ModuleName) -> bool:
        """Whether a quantised module is written in the element type of the export, since its factor has no place.

        Raises `ExportError` for experts whose factor belongs into the norm: the router reads that, too.
        """
        scheme = self.quantization.scheme(module)
        if scheme is None or self._factor(module) is None:
            return False
        if scheme.scheme not in SMOOTHED:
            raise ExportError(f"{module}: a factor of activations, which {scheme.scheme.value} has no place for")
        last = module.pattern.rpartition(".")[2]
        if "{expert}" in module.pattern and last == "linear_fc1":
            raise ExportError(
                f"{module}: the factor of its activations has no place in compressed-tensors, since the norm that "
                "would take it feeds the router, too; give --hf-quantization-format modelopt"
            )
        by_row = scheme.scheme is not Scheme.NVFP4_AWQ  # whose E4M3 scales of blocks would have to be rounded anew
        if last == "linear_proj":
            return not (by_row and self._value_takes())
        return last == "linear_fc2" and not (by_row and self._up_takes())

    def _value_takes(self) -> bool:
        """Whether rows of value can take the factor of attention's output: each of them feeds one channel of it."""
        config = self.quantization.logical.config
        is_plain = config.kv_lora_rank == 0 and config.num_attention_heads == config.num_query_groups
        blocks = config.blocks is None
        return is_plain and blocks and self.quantization.kv_cache is KvScheme.NONE

    def _up_takes(self) -> bool:
        config = self.quantization.logical.config
        return config.gated and config.activation_clamp is None and config.glu_offset == 0.0

    def _scheme(self, resolved: Resolved) -> tuple[ModuleName | None, Scheme | None]:
        part = resolved.slices[0][0]
        if not resolved.name.endswith("weight"):
            return None, None
        module = self.quantization.module_of(part.input.logical, layer=resolved.layer, expert=part.expert)
        scheme = self.quantization.scheme(module)
        return module, None if scheme is None else scheme.scheme

    def _factor(self, module: ModuleName) -> Factors | None:
        found: SourceTensor | None = self.quantization.pre_quant_scale(module)
        return None if found is None else Factors(View.of(found.slab, found.shape), dtype_by_name(found.dtype))

    def _taken(self, resolved: Resolved) -> Factors | None:
        """The factor that the rows of a linear (or its bias) take over; None for most."""
        part = resolved.slices[0][0]
        own, _, _ = part.input.logical.removeprefix("layers.{layer}.").rpartition(".")
        behind = _TAKES.get(own)
        if behind is None:
            return None
        find = self.quantization.module_of
        module = find(f"layers.{{layer}}.{behind}.weight", layer=resolved.layer, expert=part.expert)
        if module is None or self.quantization.scheme(module) is None or self.keeps_precision(module):
            return None
        factor = self._factor(module)
        before = find(f"layers.{{layer}}.{own}.weight", layer=resolved.layer, expert=part.expert)
        if factor is not None and (self.quantization.scheme(before) is None or len(resolved.slices[0]) > 1):
            raise ExportError(f"{module}: the factor of its activations has no place: {before} is not quantised alone")
        return factor

    def _in_format(
        self, made: PlannedTensor, planned: PlannedTensor, scheme: Scheme, taken: Factors | None
    ) -> PlannedTensor:
        """A tensor of ModelOpt's layout as this one has it."""
        recipe = made.recipe
        if made.name == planned.name and (scheme in FP4 or scheme is Scheme.INT4_AWQ):
            made = replace(made, name=made.name.removesuffix("weight") + "weight_packed")
            if scheme is Scheme.INT4_AWQ:
                assert isinstance(recipe, Encoded)
                words = Codes.STORED_INT4_WORDS if recipe.codes.are_stored else Codes.INT4_WORDS
                made = replace(made, recipe=replace(recipe, codes=words))
        elif isinstance(recipe, Stored):
            dtype = planned.dtype if scheme is Scheme.INT4_AWQ else made.dtype
            made = replace(made, dtype=dtype, recipe=replace(recipe, squeezed=False, times=taken))
        elif isinstance(recipe, Scalars) and scheme in FP4 and not made.name.endswith(("k_scale", "v_scale")):
            made = replace(made, recipe=replace(recipe, reciprocal=True))
        return made


def _out_of_codes(planned: PlannedTensor, made: list[PlannedTensor], factor: Factors) -> PlannedTensor:
    """The weight that stored codes stand for, with the factor of its activations."""
    recipe = made[0].recipe
    kinds = {Codes.STORED_INT4: Codes.WEIGHTS_OF_INT4, Codes.STORED_INT8: Codes.WEIGHTS_OF_INT8}
    if not isinstance(recipe, Encoded) or recipe.codes not in kinds:
        raise ExportError(
            "the factor of its activations has no place in compressed-tensors, and its weight is stored as codes of "
            "another kind than INT4 and INT8; give --hf-quantization-format modelopt"
        )
    return replace(planned, recipe=Encoded(kinds[recipe.codes], recipe.scales, factors=factor))


def config_entry(quantization: Quantization, scheme: Scheme, ignored: list[str], group_size: int) -> dict[str, object]:
    """``quantization_config`` of config.json."""
    weights, inputs = _arguments(scheme, group_size)
    kv_cache = None
    if quantization.kv_cache is KvScheme.FP8:
        kv_cache = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}
    groups = {}
    if weights is not None:
        groups["group_0"] = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {
        "config_groups": groups,
        "format": FORMATS.get(scheme, "dense"),
        "ignore": ignored,
        "kv_cache_scheme": kv_cache,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    }


Arguments = Mapping[str, object] | None


def _arguments(scheme: Scheme, group_size: int) -> tuple[Arguments, Arguments]:
    """What is said of weights and of activations."""
    kind = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False}
    tensor = {**kind, "strategy": "tensor"}
    if scheme is Scheme.NONE:
        return None, None
    if scheme is Scheme.FP8:
        return tensor, tensor
    if scheme is Scheme.FP8_PER_CHANNEL_PER_TOKEN:
        return {**kind, "strategy": "channel"}, {**kind, "strategy": "token", "dynamic": True}
    if scheme is Scheme.INT8_SQ:
        return {**kind, "type": "int", "strategy": "channel"}, {**tensor, "type": "int"}
    if scheme is Scheme.INT4_AWQ:
        return {**kind, "num_bits": 4, "type": "int", "strategy": "group", "group_size": group_size}, None
    assert scheme in FP4, f"{scheme} is in FORMATS"
    fp4 = {**kind, "num_bits": 4, "strategy": "tensor_group", "group_size": 16}
    # The runtime finds the scale of each block of activations; that of the tensor is stored.
    return fp4, None if scheme is Scheme.W4A16_NVFP4 else {**fp4, "dynamic": "local"}
