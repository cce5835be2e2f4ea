"""The one place that imports tensorrt_llm: loading a rank's checkpoint, building its engine, saving it.

The calls are those of ``trtllm-build`` (tensorrt_llm/commands/build.py, `build_model` and `build_and_save`), for one
rank of one process. They are checked, argument by argument, against signatures of the public source of the releases
(tests/engines). Where releases differ, what is there decides, not a version number; defaults of flags excepted.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dist_export.engines.options import PLUGIN_FIELDS, EngineOptions, default_batch_size
from dist_export.errors import ExportError
from dist_export.targets.trtllm.build_command import fitting_options

_FUSED_MLP_WITH = (None, "FP8", "MIXED_PRECISION")  # commands/build.py `main`: others are built without


def build_rank(folder: Path, rank: int, options: EngineOptions, output: Path) -> None:
    """Build the engine of target `rank` of the export in `folder` on the current CUDA device, and save it in `output`.

    ``rank{R}.engine`` is written there, with rank 0 also the engine's ``config.json``. Imports tensorrt_llm, which
    initialises MPI. Raises `ExportError` without it, or for an option that the release does not have.
    """
    values = json.loads((folder / "config.json").read_text())
    _module("tensorrt_llm.logger").logger.set_level(options.log_level)
    model = load_rank(folder, rank, options)
    engine = build_model(model, options, values)
    _save(engine, output, options)


def load_rank(folder: Path, rank: int, options: EngineOptions) -> Any:
    """TensorRT-LLM's model of one rank with the weights of its file: every name and shape has been checked."""
    models = _module("tensorrt_llm.models")
    config = models.PretrainedConfig.from_json_file(str(folder / "config.json"))
    config.set_rank(rank)
    if options.logits_dtype is not None:
        config.logits_dtype = options.logits_dtype
    return _model_class(config).from_checkpoint(str(folder), config=config)


def build_model(model: Any, options: EngineOptions, values: Mapping[str, Any]) -> Any:
    """The engine of a loaded model. `values` are those of the export's config.json."""
    builder = _module("tensorrt_llm.builder")
    config = build_config(options, values)
    recorded = config.output_timing_cache
    with tempfile.TemporaryDirectory(prefix="dist_export_") as scratch:
        if options.output_timing_cache is None and recorded is not None:
            config.output_timing_cache = str(Path(scratch) / "model.cache")
        engine = builder.build(model, config)
    if engine is None or (engine.engine is None and not options.dry_run):
        raise ExportError("TensorRT-LLM built no engine; its log says why")
    engine.config.build_config.output_timing_cache = recorded  # what its config.json will say
    return engine


def build_config(options: EngineOptions, values: Mapping[str, Any]) -> Any:
    """A ``BuildConfig`` of the installed release. Raises `ExportError` naming options that it does not have.

    Classes are those that builder.py itself has imported: KVCacheType and LoraConfig have moved between modules.
    """
    builder = _module("tensorrt_llm.builder")
    known = _fields(builder.BuildConfig)
    arguments = _build_arguments(options, values)
    plugin = _plugin_config(builder, options, values)
    arguments["plugin_config"] = plugin
    if "use_fused_mlp" in known:  # 0.12 to 0.17; plugin_config alone has it since
        arguments["use_fused_mlp"] = bool(getattr(plugin, "use_fused_mlp", options.use_fused_mlp))
    if options.kv_cache_type is not None:
        if "kv_cache_type" in known:
            arguments["kv_cache_type"] = getattr(builder.KVCacheType, options.kv_cache_type.upper())
        else:  # 0.12
            plugin.paged_kv_cache = options.kv_cache_type == "paged"
    if options.speculative_decoding_mode is not None:
        modes = builder.SpeculativeDecodingMode
        arguments["speculative_decoding_mode"] = getattr(modes, options.speculative_decoding_mode.upper())
    if options.lora_plugin not in (None, "disable"):
        arguments["lora_config"] = _lora_config(builder, options)
    unknown = sorted(set(arguments) - known)
    if unknown:
        raise ExportError(f"the installed TensorRT-LLM has no build option {', '.join(unknown)}")
    if not dataclasses.is_dataclass(builder.BuildConfig):  # 1.2: pydantic, which refuses None where it is not declared
        arguments = {name: value for name, value in arguments.items() if value is not None}
    return builder.BuildConfig(**arguments)


def build_from_weights(weights: Mapping[str, Any], config: Any, options: EngineOptions, output: str | Path) -> Any:
    """Build and save one rank's engine from tensors in memory, on the current CUDA device; returns it.

    `config` is a `dist_export.megatron_export.RankConfig`, or TensorRT-LLM's own with its rank set. Raises
    `ExportError`.
    """
    from dist_export.engines.options import check

    native = config.to_pretrained_config() if hasattr(config, "to_pretrained_config") else config
    values = dict(config.values) if hasattr(config, "values") else native.to_dict()
    check(options, values, _release())
    if options.logits_dtype is not None:
        native.logits_dtype = options.logits_dtype
    utilities = _module("tensorrt_llm.models.modeling_utils")
    prepared = _named_for(native.architecture, weights)
    # Until 0.13 the dictionary is changed in place and nothing returned; since, the new one is returned.
    prepared = utilities.preprocess_weights(prepared, native) or prepared
    model = _model_class(native).from_config(native)
    model.load(prepared)
    engine = build_model(model, options, values)
    _save(engine, Path(output), options)
    return engine


def pretrained_config(values: dict[str, Any], rank: int) -> Any:
    """TensorRT-LLM's configuration object of one rank."""
    config = _module("tensorrt_llm.models").PretrainedConfig.from_dict(values)
    config.set_rank(rank)
    return config


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        if error.name is not None and error.name.partition(".")[0] == "tensorrt_llm" and "." not in error.name:
            raise ExportError("TensorRT-LLM is not installed; build in its release image (docker/README.md)") from error
        raise ExportError(f"the installed TensorRT-LLM cannot be used: {name}: {error}") from error


def _model_class(config: Any) -> Any:
    known = _module("tensorrt_llm.models").MODEL_MAP
    if config.architecture not in known:
        raise ExportError(f"the installed TensorRT-LLM has no model class {config.architecture}")
    return known[config.architecture]


def _fields(config_class: Any) -> set[str]:
    """Names of a configuration class: a dataclass, or a pydantic model in later releases."""
    if dataclasses.is_dataclass(config_class):
        return {item.name for item in dataclasses.fields(config_class)}
    return set(config_class.model_fields)


def _build_arguments(options: EngineOptions, values: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of ``BuildConfig`` that every release has."""
    fitting = fitting_options(values)
    max_seq_len = options.max_seq_len or (int(fitting["max_seq_len"]) if "max_seq_len" in fitting else None)
    return {
        "max_batch_size": options.max_batch_size or default_batch_size(_release()),
        # trtllm-build cuts it off with a warning
        "max_input_len": min(options.max_input_len, max_seq_len) if max_seq_len else options.max_input_len,
        "max_seq_len": max_seq_len,
        "max_num_tokens": options.max_num_tokens,
        "opt_num_tokens": options.opt_num_tokens,
        "max_beam_width": options.max_beam_width,
        "max_prompt_embedding_table_size": options.max_prompt_embedding_table_size,
        "gather_context_logits": options.gather_context_logits,
        "gather_generation_logits": options.gather_generation_logits,
        "strongly_typed": options.strongly_typed,
        "profiling_verbosity": options.profiling_verbosity,
        "enable_debug_output": options.enable_debug_output,
        "use_refit": options.refit,
        "use_strip_plan": options.strip_plan,
        "weight_sparsity": options.weight_sparsity,
        "weight_streaming": options.weight_streaming,
        "input_timing_cache": options.input_timing_cache,
        "output_timing_cache": options.output_timing_cache,
        "max_draft_len": options.max_draft_len,
        "dry_run": options.dry_run,
    }


def _plugin_config(builder: Any, options: EngineOptions, values: Mapping[str, Any]) -> Any:
    plugin = builder.PluginConfig()
    chosen = {name: getattr(options, name) for name in PLUGIN_FIELDS if getattr(options, name) is not None}
    if "use_paged_context_fmha" in fitting_options(values):
        chosen.setdefault("use_paged_context_fmha", False)
    if options.fast_build:
        chosen["manage_weights"] = True
    if options.use_fused_mlp is None and not _takes_fused_mlp(values) and hasattr(plugin, "use_fused_mlp"):
        chosen["use_fused_mlp"] = False
    if not hasattr(plugin, "use_fused_mlp") and "use_fused_mlp" in _fields(builder.BuildConfig):
        chosen.pop("use_fused_mlp", None)  # 0.12: no plugin's
    if chosen.get("gemm_plugin") == "disable" and hasattr(plugin, "_explicitly_disable_gemm_plugin"):
        plugin._explicitly_disable_gemm_plugin = True  # or NVFP4 weights would switch it on
    missing = [name for name in chosen if not hasattr(plugin, name)]
    if missing:
        raise ExportError(f"the installed TensorRT-LLM has no build option {', '.join(missing)}")
    for name, value in chosen.items():
        setattr(plugin, name, None if value == "disable" else value)
    return plugin


def _takes_fused_mlp(values: Mapping[str, Any]) -> bool:
    """Whether gate and up may become one matrix: not with other quantisations, and not where blocks differ."""
    algorithm = (values.get("quantization") or {}).get("quant_algo")
    return algorithm in _FUSED_MLP_WITH and values.get("architecture") != "DeciLMForCausalLM"


def _lora_config(builder: Any, options: EngineOptions) -> Any:
    arguments: dict[str, Any] = {
        "lora_dir": list(options.lora_dir),
        "lora_ckpt_source": options.lora_ckpt_source,
        "max_lora_rank": options.max_lora_rank,
    }
    if options.lora_target_modules:
        arguments["lora_target_modules"] = list(options.lora_target_modules)
    return builder.LoraConfig(**arguments)


_DECILM = ((".mlp.", ".ffn."), (".attn_replacing_linear.", ".attention."), (".mlp_replacing_linear.", ".ffn."))


def _named_for(architecture: str, weights: Mapping[str, Any]) -> dict[str, Any]:
    """Weights under the names of the class; ``DeciLMForCausalLM.from_checkpoint`` renames, its ``load`` does not."""
    if architecture != "DeciLMForCausalLM":
        return dict(weights)
    renamed = {}
    for name, value in weights.items():
        for old, new in _DECILM:
            name = name.replace(old, new)
        renamed[name] = value
    return renamed


def _save(engine: Any, output: Path, options: EngineOptions) -> None:
    if not options.dry_run:
        engine.save(str(output))


def _release() -> str:
    from dist_export.engines.availability import installed_release

    return installed_release()
