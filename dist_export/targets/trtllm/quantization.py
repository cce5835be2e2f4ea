"""Quantised linears as TensorRT-LLM's loader wants them on disk.

Sources: tensorrt_llm/quantization/layers.py (parameters of FP8Linear, SmoothQuantLinear, FP4Linear,
WeightOnlyGroupwiseQuantLinear), tensorrt_llm/models/modeling_utils.py (``preprocess_weights``), and what ModelOpt
writes.
"""

from __future__ import annotations

from collections.abc import Iterator

from dist_export.checkpoint.quantizer_scheme import KvScheme, Scheme
from dist_export.models.quantization import Quantization, kv_module
from dist_export.plan.quantize import FP4, FP8_MAX, INT8_MAX, Dialect, Role
from dist_export.plan.recipes import Constant, Recipe, Scalars
from dist_export.plan.shard import PlannedTensor, Resolved
from dist_export.tensors.boxes import Shape
from dist_export.tensors.dtypes import FLOAT32, INT8
from dist_export.tensors.views import View

_WEIGHT, _INPUT = "weights_scaling_factor", "activation_scaling_factor"
_SECOND, _FACTOR = "weights_scaling_factor_2", "prequant_scaling_factor"
NAMES = {
    Scheme.FP8: {Role.WEIGHT_SCALE: _WEIGHT, Role.INPUT_SCALE: _INPUT},
    Scheme.FP8_PER_CHANNEL_PER_TOKEN: {Role.ROW_SCALE: "per_channel_scale"},
    Scheme.INT8_SQ: {Role.ROW_SCALE: _WEIGHT, Role.INPUT_SCALE: _INPUT, Role.PRE_QUANT_SCALE: _FACTOR},
    Scheme.INT4_AWQ: {Role.WEIGHT_SCALE: _WEIGHT, Role.PRE_QUANT_SCALE: _FACTOR},
    Scheme.W4A8_AWQ: {
        Role.WEIGHT_SCALE: _WEIGHT,
        Role.WEIGHT_SCALE_2: _SECOND,
        Role.INPUT_SCALE: _INPUT,
        Role.PRE_QUANT_SCALE: _FACTOR,
    },
    Scheme.NVFP4: {Role.WEIGHT_SCALE: _WEIGHT, Role.WEIGHT_SCALE_2: _SECOND, Role.INPUT_SCALE: _INPUT},
    Scheme.INT8_WO: {},
    Scheme.INT4_WO: {},
}
"""Weight-only linears are written as they are: the loader quantises them for the GPU that it finds."""


def _scalar_shape(scheme: Scheme) -> Shape:
    """ModelOpt's: its FP4 scalars have no dim, which the loader turns into one (tensorrt_llm/parameter.py)."""
    return () if scheme in FP4 else (1,)


def _expert_scalars(scheme: Scheme, num_experts: int) -> Shape:
    return (num_experts,) if scheme in FP4 else (num_experts, 1)


def kv_cache_tensors(planned: PlannedTensor, resolved: Resolved, quantization: Quantization) -> Iterator[PlannedTensor]:
    """Scales of a layer's KV cache, beside its fused qkv. Releases differ in which of the three they read.

    FP8 scales are at least 1, as ModelOpt has them: the cache then holds values up to 448 as they are.
    """
    head, fused, _ = planned.name.rpartition("qkv.weight")
    if quantization.kv_cache is KvScheme.NONE or not fused:
        return
    fp8 = quantization.kv_cache is KvScheme.FP8
    key, value = kv_module(resolved.layer, "key"), kv_module(resolved.layer, "value")
    for part, modules in {"k": (key,), "v": (value,), "kv": (key, value)}.items():
        recipe: Recipe
        if quantization.kv_cache_scale is not None:
            recipe = Constant((quantization.kv_cache_scale,), (1,))
        else:
            divisor = FP8_MAX if fp8 else INT8_MAX
            recipe = Scalars((modules,), divisor, (1,), of_inputs=True, at_least=1.0 if fp8 else 0.0)
        yield PlannedTensor(f"{head}{part}_cache_scaling_factor", FLOAT32, View.zeros((1,)), FLOAT32, (), recipe=recipe)


DIALECT = Dialect(
    names=NAMES,
    scalar_shape=_scalar_shape,
    expert_scalars=_expert_scalars,
    int4_dtype=INT8,
    more=kv_cache_tensors,
)
