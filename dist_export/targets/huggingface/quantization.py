"""Quantised linears in ModelOpt's Hugging Face layout, which vLLM, SGLang and TensorRT-LLM's PyTorch backend read.

Sources: vllm/model_executor/layers/quantization/modelopt.py, tensorrt_llm/_torch/modules/linear.py, and what ModelOpt's
export_hf_checkpoint writes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from dist_export.checkpoint.quantizer_names import ModuleName
from dist_export.checkpoint.quantizer_scheme import KvScheme, Scheme
from dist_export.errors import ExportError
from dist_export.models.quantization import Quantization, kv_module
from dist_export.models.rules import Scope, TargetRule
from dist_export.plan.quantize import AWQ, FP4, FP8_MAX, Dialect, LinearQuantizer, Role
from dist_export.plan.recipes import Constant, Recipe, Scalars
from dist_export.plan.shard import PlannedTensor, Resolved, TensorQuantizer
from dist_export.plan.target_modules import target_modules
from dist_export.targets.huggingface import compressed_tensors
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
    *(Scheme.FP8, Scheme.FP8_PER_CHANNEL_PER_TOKEN, Scheme.INT4_AWQ, Scheme.W4A8_AWQ),
    *(Scheme.NVFP4, Scheme.NVFP4_AWQ, Scheme.W4A16_NVFP4),
)
_WITH_FACTORS = (*AWQ, Scheme.NVFP4_AWQ)
"""Of these the runtime multiplies the inputs of attention's output and of down (``load_weights_vanilla``)."""


def _folds_factor(scheme: Scheme, logical: str) -> bool:
    """With AWQ the norm takes over the factor of qkv and of gate and up: the runtimes have no place for it there."""
    return scheme in _WITH_FACTORS and logical in ("attention.query.weight", "mlp.gate.weight", "mlp.up.weight")


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

MODELOPT, COMPRESSED_TENSORS, AUTO = "modelopt", "compressed-tensors", "auto"
_FOR_VLLM = (Scheme.NONE, Scheme.INT8_SQ, Scheme.INT4_AWQ, Scheme.NVFP4_AWQ)
"""What vLLM reads as compressed-tensors only (vllm/model_executor/layers/quantization/modelopt.py, QUANT_ALGOS)."""
_FOR_TENSORRT_LLM = (Scheme.NONE, Scheme.INT4_AWQ, Scheme.W4A8_AWQ, Scheme.NVFP4_AWQ)
"""What only TensorRT-LLM's PyTorch backend reads in ModelOpt's layout."""


def chosen_format(quantization: Quantization, wanted: str) -> str:
    """The layout of the folder: as wanted, or with ``auto`` one that vLLM reads where there is one.

    Raises `ExportError` for schemes that the layout has no form for, or that no runtime reads in it.
    """
    scheme, config = _one_scheme(quantization), quantization.logical.config
    if (scheme in AWQ or scheme in compressed_tensors.SMOOTHED) and config.parallel_attention:
        raise ExportError(f"{scheme.value}: the norm in front of attention feeds the MLP, too: it takes no factor")
    if wanted == AUTO:
        wanted = COMPRESSED_TENSORS if scheme in _FOR_VLLM else MODELOPT
    if scheme is Scheme.MIXED and wanted == MODELOPT:
        return wanted
    if wanted == COMPRESSED_TENSORS and scheme is not Scheme.NONE and scheme not in compressed_tensors.FORMATS:
        raise ExportError(f"compressed-tensors has no form for {scheme.value}; {_hint(scheme)}")
    if wanted == MODELOPT and scheme is not Scheme.NONE and scheme not in SCHEMES:
        raise ExportError(f"no runtime reads {scheme.value} in ModelOpt's Hugging Face layout; {_hint(scheme)}")
    if wanted == MODELOPT and scheme is Scheme.NVFP4_AWQ and any("{expert}" in m.pattern for m in quantization.schemes):
        raise ExportError("no runtime is known to read the factors of experts' activations beside NVFP4 weights")
    return wanted


def _hint(scheme: Scheme) -> str:
    if scheme is Scheme.MIXED:
        return f"give --hf-quantization-format {MODELOPT}"
    if scheme in compressed_tensors.FORMATS:
        return f"give --hf-quantization-format {COMPRESSED_TENSORS}"
    return f"give --hf-quantization-format {MODELOPT}" if scheme in SCHEMES else "export it with --target trtllm"


def quantizer_of(quantization: Quantization, layout: str) -> TensorQuantizer:
    """What makes a folder's tensors in a layout."""
    if layout == COMPRESSED_TENSORS:
        return compressed_tensors.CompressedTensorsQuantizer(quantization)
    return LinearQuantizer(quantization, DIALECT)


def config_of(quantization: Quantization, layout: str, rules: Iterable[TargetRule]) -> dict[str, object]:
    """``quantization_config`` of config.json; `rules` are the table of the model class."""
    scheme, ignored = _one_scheme(quantization), unquantized(quantization, layout, rules)
    if layout == COMPRESSED_TENSORS:
        linears = [name for name in ignored if name != EMBEDDING]
        return compressed_tensors.config_entry(quantization, scheme, linears, _group_size(quantization))
    return config_entry(quantization, ignored, mixed_layers(quantization, rules))


def notes_of(quantization: Quantization, layout: str) -> tuple[str, ...]:
    """What the user should know of the layout."""
    scheme = _one_scheme(quantization)
    if layout == MODELOPT and scheme in _FOR_TENSORRT_LLM:
        name = "a KV cache's scales alone" if scheme is Scheme.NONE else scheme.value
        return (f"vLLM does not read {name} in ModelOpt's layout; TensorRT-LLM's PyTorch backend does",)
    if layout == MODELOPT:
        return ()
    quantizer = compressed_tensors.CompressedTensorsQuantizer(quantization)
    kept = [module for module in quantization.modules() if quantizer.keeps_precision(module)]
    if not kept:
        return ()
    return (
        f"{len(kept)} linears like {kept[0]} keep their precision: compressed-tensors has no place for the factor of "
        "their activations, and no linear in front can take it over",
    )


VLLM = "vllm serve {output}"
SGLANG = "python -m sglang.launch_server --model-path {output}"
TENSORRT_LLM = "trtllm-serve {output} --backend pytorch"


def served_by(quantization: Quantization | None, layout: str) -> tuple[str, ...]:
    """The commands that read a folder of the layout, the first to go on with."""
    if quantization is None:
        return VLLM, SGLANG, TENSORRT_LLM
    if layout == COMPRESSED_TENSORS:
        return VLLM, SGLANG
    return (TENSORRT_LLM,) if _one_scheme(quantization) in _FOR_TENSORRT_LLM else (VLLM, SGLANG, TENSORRT_LLM)


EMBEDDING = "model.embed_tokens"
_ENDS = ("lm_head", EMBEDDING)


def unquantized(quantization: Quantization, layout: str, rules: Iterable[TargetRule]) -> list[str]:
    """Modules of the folder that are not quantised: the ends, routers, and linears that were left out."""
    config, found = quantization.logical.config, list(_ENDS)
    quantizer = compressed_tensors.CompressedTensorsQuantizer(quantization)
    chosen = [rule for rule in rules if rule.scope is Scope.LAYER and rule.target.endswith(".weight")]
    for layer in range(config.num_layers):
        for rule in chosen:
            if not (rule.when(config) and rule.layers(config, layer)):
                continue
            for expert in range(config.num_experts) if "{expert}" in rule.target else (-1,):
                logical = rule.inputs[0].logical
                module = quantization.module_of(logical, layer=layer, expert=expert)
                if not _is_linear(module, logical):
                    continue
                if (
                    module is None
                    or quantization.scheme(module) is None
                    or (layout == COMPRESSED_TENSORS and quantizer.keeps_precision(module))
                ):
                    name = rule.target.removesuffix(".weight").replace("{layer}", str(layer))
                    found.append(name.replace("{expert}", str(expert)))
    return found


def _is_linear(module: ModuleName | None, logical: str) -> bool:
    if module is None:
        return logical.endswith("shared_expert_gate.weight")
    last = module.pattern.rpartition(".")[2]
    return last.startswith("linear_") or last == "router"


MIXABLE = (Scheme.FP8, Scheme.NVFP4, Scheme.W4A16_NVFP4)
"""Schemes that vLLM takes in one model (``ModelOptMixedPrecisionConfig``)."""


def mixed_layers(quantization: Quantization, rules: Iterable[TargetRule]) -> dict[str, object]:
    """``quantized_layers``: the scheme of every quantised linear of a model with several; empty for any other.

    Raises `ExportError` for experts of one layer that differ: runtimes hold them in one tensor.
    """
    if quantization.overall is not Scheme.MIXED:
        return {}
    found: dict[str, object] = {}
    of_experts: dict[str, Scheme] = {}
    layers = ((layer, layer) for layer in range(quantization.logical.config.num_layers))
    for name, (scheme, size) in ((m.name, m.kind) for m in target_modules(rules, quantization, layers)):
        experts, inside, _ = name.partition(".experts.")
        if inside and of_experts.setdefault(experts, scheme) is not scheme:
            raise ExportError(f"{name}: all experts of a layer must be quantised alike, or all left out")
        if scheme is not Scheme.NONE:
            found[name] = {"quant_algo": scheme.value, **({"group_size": size or 16} if scheme in FP4 else {})}
    return found


def quant_config(
    quantization: Quantization, ignored: list[str], layers: Mapping[str, object] | None = None
) -> dict[str, object]:
    """hf_quant_config.json; `ignored` are the modules that are not quantised, `layers` those of a model with several
    schemes."""
    scheme = _one_scheme(quantization)
    table: dict[str, object] = {
        "quant_algo": None if scheme is Scheme.NONE else scheme.value,
        "kv_cache_quant_algo": None if quantization.kv_cache is KvScheme.NONE else quantization.kv_cache.value,
    }
    if scheme in FP4:
        table["group_size"] = 16
    if scheme in _WITH_FACTORS:
        size = 16 if scheme in FP4 else _group_size(quantization)
        table |= {"group_size": size, "has_zero_point": False, "pre_quant_scale": True}
    table["exclude_modules"] = ignored
    if layers:
        table["quantized_layers"] = dict(layers)
    return {"producer": {"name": "modelopt", "version": MODELOPT_VERSION}, "quantization": table}


MODELOPT_VERSION = "0.47.0"
"""Whose layout this is. Loaders look at the producer's name to recognise it."""


def config_entry(
    quantization: Quantization, ignored: list[str], layers: Mapping[str, object] | None = None
) -> dict[str, object]:
    """``quantization_config`` of config.json in ModelOpt's layout."""
    scheme = _one_scheme(quantization)
    entry: dict[str, object] = {"ignore": ignored}
    if scheme in (Scheme.FP8, *FP4):
        kind: dict[str, object] = {"dynamic": False, "num_bits": 8 if scheme is Scheme.FP8 else 4, "type": "float"}
        if scheme in FP4:
            kind["group_size"] = 16
        groups: dict[str, object] = {"weights": dict(kind), "targets": ["Linear"]}
        if scheme is not Scheme.W4A16_NVFP4:
            groups["input_activations"] = dict(kind)
        entry["config_groups"] = {"group_0": groups}
    if layers:
        entry["quantized_layers"] = dict(layers)
    if quantization.kv_cache is KvScheme.FP8:
        entry["kv_cache_scheme"] = {"dynamic": False, "num_bits": 8, "type": "float"}
    producer = {"name": "modelopt", "version": MODELOPT_VERSION}
    algorithm = None if scheme is Scheme.NONE else scheme.value
    return {**entry, "quant_algo": algorithm, "producer": producer, "quant_method": "modelopt"}


def _group_size(quantization: Quantization) -> int:
    """Columns of INT4 blocks, of all linears. Raises `ExportError` where they differ."""
    sizes = {each.group_size or 128 for each in quantization.schemes.values()}
    if len(sizes) > 1:
        raise ExportError(f"linears have blocks of {sorted(sizes)} columns, which a Hugging Face folder cannot say")
    return sizes.pop() if sizes else 128


def _one_scheme(quantization: Quantization) -> Scheme:
    if quantization.kv_cache is KvScheme.INT8:
        raise ExportError("an INT8 KV cache has no Hugging Face form; give --kv-cache fp8 or --kv-cache none")
    others = sorted({each.scheme.value for each in quantization.schemes.values() if each.scheme not in MIXABLE})
    if quantization.overall is Scheme.MIXED and others:
        raise ExportError(f"no runtime reads {', '.join(others)} and other schemes in one folder; see --exclude")
    return quantization.overall
