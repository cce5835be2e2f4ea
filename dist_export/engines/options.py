"""What ``trtllm-build`` can be told, as one value: its names, its defaults, checked against the model.

Sources: tensorrt_llm/commands/build.py (`parse_arguments`), tensorrt_llm/plugin/plugin.py (`PluginConfig`) and the
checks of tensorrt_llm/builder.py (`build`, `_init_max_seq_len`) of each release.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args, get_type_hints

from msgspec import Struct
from msgspec.structs import fields

from dist_export.errors import ExportError, Faults
from dist_export.targets.trtllm.releases import ALL, Span

PLUGIN_DTYPES = ("auto", "float16", "bfloat16", "float32", "disable")


class EngineOptions(Struct, frozen=True, kw_only=True):
    """Options of an engine build. None: what the release's ``trtllm-build`` does without the option."""

    max_batch_size: int | None = None
    """None: `default_batch_size` of the release."""
    max_input_len: int = 1024
    max_seq_len: int | None = None
    """Tokens of a prompt and its answer together; None: the model's positions."""
    max_num_tokens: int | None = 8192
    opt_num_tokens: int | None = None
    max_beam_width: int = 1
    max_prompt_embedding_table_size: int = 0
    kv_cache_type: str | None = None
    strongly_typed: bool = True
    logits_dtype: str | None = None
    gather_context_logits: bool = False
    gather_generation_logits: bool = False
    refit: bool = False
    """Weights of the engine can be replaced; ``trtllm-build`` has no flag for it."""
    strip_plan: bool = False
    weight_sparsity: bool = False
    weight_streaming: bool = False
    fast_build: bool = False
    profiling_verbosity: str = "layer_names_only"
    enable_debug_output: bool = False
    input_timing_cache: str | None = None
    output_timing_cache: str | None = None
    """Unlike ``trtllm-build``, no model.cache appears in the current folder."""
    dry_run: bool = False
    workers: int | None = None
    """Builds at a time on this machine; None: one per GPU."""
    log_level: str = "info"
    speculative_decoding_mode: str | None = None
    max_draft_len: int = 0
    lora_dir: tuple[str, ...] = ()
    lora_ckpt_source: str = "hf"
    lora_target_modules: tuple[str, ...] = ()
    max_lora_rank: int = 64
    gpt_attention_plugin: str | None = None
    gemm_plugin: str | None = None
    gemm_swiglu_plugin: str | None = None
    low_latency_gemm_plugin: str | None = None
    moe_plugin: str | None = None
    nccl_plugin: str | None = None
    lora_plugin: str | None = None
    context_fmha: bool | None = None
    remove_input_padding: bool | None = None
    use_paged_context_fmha: bool | None = None
    use_fp8_context_fmha: bool | None = None
    tokens_per_block: int | None = None
    multiple_profiles: bool | None = None
    reduce_fusion: bool | None = None
    use_fused_mlp: bool | None = None
    user_buffer: bool | None = None
    streamingllm: bool | None = None
    pp_reduce_scatter: bool | None = None

    @classmethod
    def of(cls, values: Mapping[str, object]) -> EngineOptions:
        """Options by name, as YAML or flags give them: ``enable`` and ``disable`` are true and false.

        Raises `ExportError` naming every unknown option and every value of a wrong type.
        """
        faults = Faults("engine options")
        found: dict[str, Any] = {}
        types = get_type_hints(cls)
        for given, value in values.items():
            name = given.replace("-", "_")
            if name not in types:
                faults.add(f"{given} is unknown; known: {', '.join(types)}" if not faults else f"{given} is unknown")
                continue
            try:
                found[name] = _typed(value, types[name])
            except ValueError:
                faults.add(f"{given}: {value!r} is not {_described(types[name])}")
        faults.raise_if_any()
        return cls(**found)

    def as_values(self) -> dict[str, object]:
        """Plain values by name, of those options that are not at their default."""
        changed = {
            item.name: getattr(self, item.name)
            for item in fields(self)
            if getattr(self, item.name) != item.default
        }
        return {name: list(value) if isinstance(value, tuple) else value for name, value in changed.items()}


PLUGIN_FIELDS = (
    *("gpt_attention_plugin", "gemm_plugin", "gemm_swiglu_plugin", "low_latency_gemm_plugin", "moe_plugin"),
    *("nccl_plugin", "lora_plugin", "context_fmha", "remove_input_padding", "use_paged_context_fmha"),
    *("use_fp8_context_fmha", "tokens_per_block", "multiple_profiles", "reduce_fusion", "use_fused_mlp", "user_buffer"),
    *("streamingllm", "pp_reduce_scatter"),
)
"""Options that are attributes of ``PluginConfig``."""

SINCE: Mapping[str, Span] = {
    "low_latency_gemm_plugin": Span("0.13"),
    "user_buffer": Span("0.16"),
    "pp_reduce_scatter": Span("0.15"),
    "streamingllm": Span(last="1.0"),  # commands/build.py, `build_model`, refuses it since
}
"""Options that only some releases have; all others are in every release."""

VALUES_SINCE: Mapping[tuple[str, object], Span] = {
    ("kv_cache_type", "disabled"): Span("0.13"),
    ("gemm_plugin", "nvfp4"): Span("0.18"),
    ("log_level", "trace"): Span("1.1"),
}
"""Values that only some releases know, of options that every release has."""

CHOICES: Mapping[str, tuple[str, ...]] = {
    "kv_cache_type": ("paged", "continuous", "disabled"),
    "logits_dtype": ("float16", "float32"),
    "profiling_verbosity": ("layer_names_only", "detailed", "none"),
    "log_level": ("internal_error", "error", "warning", "info", "verbose", "debug", "trace"),
    "speculative_decoding_mode": ("draft_tokens_external", "lookahead_decoding"),
    "lora_ckpt_source": ("hf", "nemo"),
    "gpt_attention_plugin": PLUGIN_DTYPES,
    "gemm_plugin": (*PLUGIN_DTYPES, "fp8", "nvfp4"),
    "gemm_swiglu_plugin": ("fp8", "disable"),
    "low_latency_gemm_plugin": ("fp8", "disable"),
    "moe_plugin": PLUGIN_DTYPES,
    "nccl_plugin": PLUGIN_DTYPES,
    "lora_plugin": PLUGIN_DTYPES,
}


def default_batch_size(release: str) -> int:
    """What ``trtllm-build`` of a release does without ``--max_batch_size``."""
    return 256 if release in ("0.12", "0.13") else 2048


def option_flags() -> dict[str, bool]:
    """Every option's name, and whether it is a switch."""
    return {name: str(kind).startswith("bool") for name, kind in EngineOptions.__annotations__.items()}


def read_options(file: Path | None, given: Mapping[str, object]) -> EngineOptions:
    """Options of a YAML (or JSON) file, and single ones that replace them. Raises `ExportError`."""
    values: dict[str, object] = {}
    if file is not None:
        from dist_export.checkpoint.plain_text import parse_yaml

        try:
            values = parse_yaml(file.read_bytes(), origin=str(file))
        except OSError as error:
            raise ExportError(f"--engine-config {file}: {error.strerror}") from error
    return EngineOptions.of({**values, **given})


def parse_assignments(texts: list[str]) -> dict[str, object]:
    """``["gemm_plugin=auto"]`` -> {"gemm_plugin": "auto"}. Raises `ExportError`."""
    values: dict[str, object] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise ExportError(f"--engine-option {text}: expected NAME=VALUE")
        values[name] = value
    return values


def check(options: EngineOptions, config: Mapping[str, Any], release: str) -> None:
    """Raise one `ExportError` naming every option that the model, its quantisation or the release does not allow.

    `config` is the export's config.json. Nothing is read and nothing imported.
    """
    faults = Faults(f"engine options do not fit {config.get('architecture')} in TensorRT-LLM {release}")
    for name, value in options.as_values().items():
        if release not in SINCE.get(name, ALL):
            faults.add(f"{name} is an option of TensorRT-LLM {SINCE[name]}")
        if not isinstance(value, list) and release not in VALUES_SINCE.get((name, value), ALL):
            faults.add(f"{name} {value} is known to TensorRT-LLM {VALUES_SINCE[name, value]}")
        if name in CHOICES and value not in CHOICES[name]:
            faults.add(f"{name} is {value}, expected one of {', '.join(CHOICES[name])}")
    _check_numbers(options, config, faults)
    _check_plugins(options, config, faults)
    _check_attention(options, config, faults)
    _check_weights(options, config, faults)
    faults.raise_if_any()


def longest(config: Mapping[str, Any]) -> int | None:
    """Positions that the model has: those of config.json, stretched by a linear rotary scaling."""
    positions = config.get("max_position_embeddings")
    if not isinstance(positions, int):
        return None
    scaling = config.get("rotary_scaling") or {}
    kind = scaling.get("type", scaling.get("rope_type"))
    return int(positions * float(scaling.get("factor", 1.0))) if kind == "linear" else positions


def _check_numbers(options: EngineOptions, config: Mapping[str, Any], faults: Faults) -> None:
    for name in ("max_batch_size", "max_input_len", "max_seq_len", "max_num_tokens", "opt_num_tokens",
                 "max_beam_width", "workers", "tokens_per_block", "max_lora_rank"):  # fmt: skip
        value = getattr(options, name)
        if value is not None and value < 1:
            faults.add(f"{name} is {value}, must be at least 1")
    positions = longest(config)
    if options.max_seq_len is not None and positions is not None and options.max_seq_len > positions:
        faults.add(f"max_seq_len {options.max_seq_len} is more than the model's {positions} positions")
    limit = options.max_seq_len or positions
    chosen = "max_input_len" in options.as_values()  # the default is cut off without a word
    if limit is not None and chosen and options.max_input_len > limit:
        faults.add(f"max_input_len {options.max_input_len} is more than max_seq_len {limit}")
    if options.opt_num_tokens and options.max_num_tokens and options.opt_num_tokens > options.max_num_tokens:
        faults.add(f"opt_num_tokens {options.opt_num_tokens} is more than max_num_tokens {options.max_num_tokens}")
    if options.opt_num_tokens and options.multiple_profiles:
        faults.add("opt_num_tokens and multiple_profiles exclude each other")
    if options.max_draft_len and options.speculative_decoding_mode is None:
        faults.add("max_draft_len is given without speculative_decoding_mode")
    if options.max_draft_len and options.gather_context_logits:
        faults.add("gather_context_logits and max_draft_len exclude each other")


def _check_plugins(options: EngineOptions, config: Mapping[str, Any], faults: Faults) -> None:
    dtype, algorithm = config.get("dtype"), _algorithm(config)
    for name in ("gpt_attention_plugin", "gemm_plugin", "moe_plugin", "nccl_plugin"):
        value = getattr(options, name)
        if value in ("float16", "bfloat16", "float32") and value != dtype:
            faults.add(f"{name} is {value}, but the export is {dtype}")
    needed = {"gemm_plugin": {"fp8": "FP8", "nvfp4": "NVFP4"}, "gemm_swiglu_plugin": {"fp8": "FP8"},
              "low_latency_gemm_plugin": {"fp8": "FP8"}}  # fmt: skip
    for name, kinds in needed.items():
        wanted = kinds.get(getattr(options, name) or "")
        if wanted is not None and algorithm not in (wanted, "MIXED_PRECISION"):
            faults.add(f"{name} {getattr(options, name)} needs weights quantised as {wanted}, these are {algorithm}")
    if (options.lora_dir or options.lora_target_modules) and options.lora_plugin in (None, "disable"):
        faults.add("lora_dir and lora_target_modules need lora_plugin")
    tp_size = config.get("mapping", {}).get("tp_size", 1)
    architecture = config.get("architecture")
    if options.reduce_fusion and (tp_size == 1 or architecture != "LlamaForCausalLM"):
        faults.add(f"reduce_fusion is for LlamaForCausalLM with tp above 1, this is {architecture} with tp {tp_size}")
    if options.user_buffer and not options.reduce_fusion:
        faults.add("user_buffer needs reduce_fusion")
    if options.streamingllm and architecture != "LlamaForCausalLM":
        faults.add(f"streamingllm is for LlamaForCausalLM, this is {architecture}")
    if options.pp_reduce_scatter and architecture != "MixtralForCausalLM":
        faults.add(f"pp_reduce_scatter is for MixtralForCausalLM, this is {architecture}")


def _check_attention(options: EngineOptions, config: Mapping[str, Any], faults: Faults) -> None:
    algorithm, cache = _algorithm(config), config.get("quantization", {}).get("kv_cache_quant_algo")
    if options.use_fp8_context_fmha and algorithm not in ("FP8", "W4A8_AWQ", "NVFP4", "MIXED_PRECISION"):
        faults.add(f"use_fp8_context_fmha needs weights quantised as FP8, these are {algorithm}")
    if options.use_paged_context_fmha:
        if cache == "INT8":
            faults.add("use_paged_context_fmha does not work with an INT8 KV cache")
        if cache == "FP8" and algorithm not in ("FP8", "W4A8_AWQ", "NVFP4", "MIXED_PRECISION"):
            faults.add("use_paged_context_fmha with an FP8 KV cache needs weights quantised as FP8")
        if options.kv_cache_type not in (None, "paged"):
            faults.add(f"use_paged_context_fmha needs a paged KV cache, kv_cache_type is {options.kv_cache_type}")
        if options.context_fmha is False:
            faults.add("use_paged_context_fmha needs context_fmha")


def _check_weights(options: EngineOptions, config: Mapping[str, Any], faults: Faults) -> None:
    algorithm = _algorithm(config) or ""
    if options.fast_build and algorithm.startswith(("W8A16", "W4A16", "W8A8", "W4A8")):
        faults.add(f"fast_build does not work with weights quantised as {algorithm}")
    if options.weight_streaming and options.gemm_plugin not in (None, "disable"):
        faults.add("weight_streaming needs gemm_plugin disable")
    if not options.strongly_typed and "FP8" in (algorithm, config.get("quantization", {}).get("kv_cache_quant_algo")):
        faults.add("strongly_typed cannot be switched off for FP8")


def _algorithm(config: Mapping[str, Any]) -> str | None:
    value = config.get("quantization", {}).get("quant_algo")
    return value if isinstance(value, str) else None


_SWITCHES = dict.fromkeys(("enable", "true", "yes", "1"), True) | dict.fromkeys(("disable", "false", "no", "0"), False)


def _typed(value: object, kind: Any) -> object:
    """`value` as an option of type `kind`. Raises ValueError."""
    kinds = set(get_args(kind)) or {kind}
    if value is None and type(None) in kinds:
        return None
    if bool in kinds:
        known = value if isinstance(value, bool) else _SWITCHES.get(str(value).lower())
        if known is None:
            raise ValueError
        return known
    if int in kinds:
        if isinstance(value, bool) or not isinstance(value, int | str):
            raise ValueError
        return int(value)
    if str in kinds and kind is not tuple and not str(kind).startswith("tuple"):
        if value is False:
            return "disable"
        if not isinstance(value, str):
            raise ValueError
        return value
    if isinstance(value, str):
        return tuple(part for part in value.split(",") if part)
    if isinstance(value, list | tuple) and all(isinstance(each, str) for each in value):
        return tuple(value)
    raise ValueError


def _described(kind: Any) -> str:
    kinds = set(get_args(kind)) or {kind}
    if bool in kinds:
        return "enable or disable"
    return "a whole number" if int in kinds else "a word, or several with commas"
