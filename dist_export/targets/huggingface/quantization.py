"""Quantised linears in ModelOpt's Hugging Face layout, which vLLM, SGLang and TensorRT-LLM's PyTorch backend read.

Sources: vllm/model_executor/layers/quantization/modelopt.py, tensorrt_llm/_torch/modules/linear.py, and what ModelOpt's
export_hf_checkpoint writes.
"""

from __future__ import annotations

from collections.abc import Iterator

from dist_export.checkpoint.quantizer_scheme import KvScheme, Scheme
from dist_export.errors import ExportError
from dist_export.models.quantization import Quantization, kv_module
from dist_export.plan.quantize import AWQ, FP4, FP8_MAX, Dialect, Role
from dist_export.plan.recipes import Constant, Recipe, Scalars
from dist_export.plan.shard import PlannedTensor, Resolved
from dist_export.tensors.dtypes import FLOAT32, UINT8
from dist_export.tensors.views import View

QUANT_CONFIG = "hf_quant_config.json"

_ALL = {
    Role.WEIGHT_SCALE: "weight_scale",
    Role.ROW_SCALE: "weight_scale",
    Role.WEIGHT_SCALE_2: "weight_scale_2",
    Role.INPUT_SCALE: "input_scale",
    Role.PRE_QUANT_SCALE: "pre_quant_scale",
}
SCHEMES = (
    *(Scheme.FP8, Scheme.FP8_PER_CHANNEL_PER_TOKEN, Scheme.INT8_SQ, Scheme.INT4_AWQ, Scheme.W4A8_AWQ, Scheme.NVFP4),
    Scheme.W4A16_NVFP4,
)


def _folds_factor(scheme: Scheme, logical: str) -> bool:
    """With AWQ the norm takes over the factor of qkv and of gate and up: the runtimes have no place for it there."""
    return scheme in AWQ and logical in ("attention.query.weight", "mlp.gate.weight", "mlp.up.weight")


def kv_cache_tensors(planned: PlannedTensor, resolved: Resolved, quantization: Quantization) -> Iterator[PlannedTensor]:
    """``k_scale`` beside k_proj's weight and ``v_scale`` beside v_proj's, amax / 448 and not clamped."""
    if quantization.kv_cache is not KvScheme.FP8:
        return
    for part, name in (("key", "k"), ("value", "v")):
        head, found, _ = planned.name.rpartition(f"{name}_proj.weight")
        if found:
            recipe: Recipe = Scalars(((kv_module(resolved.layer, part),),), FP8_MAX, (), of_inputs=True)
            if quantization.kv_cache_scale is not None:
                recipe = Constant((quantization.kv_cache_scale,), ())
            yield PlannedTensor(f"{head}{name}_proj.{name}_scale", FLOAT32, View.zeros(()), FLOAT32, (), recipe=recipe)


DIALECT = Dialect(
    names=dict.fromkeys(SCHEMES, _ALL),
    scalar_shape=lambda scheme: (),
    expert_scalars=lambda scheme, num_experts: (num_experts,),
    int4_dtype=UINT8,
    folds_factor=_folds_factor,
    more=kv_cache_tensors,
)

EXCLUDED = ("lm_head", "model.embed_tokens")


def quant_config(quantization: Quantization) -> dict[str, object]:
    """hf_quant_config.json."""
    scheme = _one_scheme(quantization)
    table: dict[str, object] = {
        "quant_algo": None if scheme is Scheme.NONE else scheme.value,
        "kv_cache_quant_algo": None if quantization.kv_cache is KvScheme.NONE else quantization.kv_cache.value,
    }
    if scheme in FP4:
        table["group_size"] = 16
    if scheme in AWQ:
        table |= {"group_size": 128, "has_zero_point": False, "pre_quant_scale": True}
    table["exclude_modules"] = list(EXCLUDED)
    return {"producer": {"name": "modelopt", "version": MODELOPT_VERSION}, "quantization": table}


MODELOPT_VERSION = "0.47.0"
"""Whose layout this is. Loaders look at the producer's name to recognise it."""


def config_entry(quantization: Quantization) -> dict[str, object]:
    """``quantization_config`` of config.json."""
    scheme = _one_scheme(quantization)
    entry: dict[str, object] = {"ignore": list(EXCLUDED)}
    if scheme in (Scheme.FP8, *FP4):
        kind: dict[str, object] = {"dynamic": False, "num_bits": 8 if scheme is Scheme.FP8 else 4, "type": "float"}
        if scheme in FP4:
            kind["group_size"] = 16
        groups: dict[str, object] = {"weights": dict(kind), "targets": ["Linear"]}
        if scheme is not Scheme.W4A16_NVFP4:
            groups["input_activations"] = dict(kind)
        entry["config_groups"] = {"group_0": groups}
    if quantization.kv_cache is KvScheme.FP8:
        entry["kv_cache_scheme"] = {"dynamic": False, "num_bits": 8, "type": "float"}
    producer = {"name": "modelopt", "version": MODELOPT_VERSION}
    return {**entry, "quant_algo": scheme.value, "producer": producer, "quant_method": "modelopt"}


def _one_scheme(quantization: Quantization) -> Scheme:
    if quantization.kv_cache is KvScheme.INT8:
        raise ExportError("an INT8 KV cache has no Hugging Face form; give --kv-cache fp8 or --kv-cache none")
    if quantization.overall is Scheme.MIXED:
        raise ExportError("linears are quantised in different ways, which this target cannot write yet; see --exclude")
    return quantization.overall
