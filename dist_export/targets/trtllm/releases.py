"""What each TensorRT-LLM release accepts in config.json: one table, used to write and to check.

The tables ``mapping``, ``quantization`` and ``moe`` are splatted into constructors, so one unknown key
there makes a release refuse the checkpoint; unknown top-level keys are only warned about. By default an
export holds what every release from the model class's first to the last accepts; where releases
disagree the user names the one that will serve (``--trtllm-version``).

Sources: tensorrt_llm/mapping.py ``Mapping.__init__``, tensorrt_llm/models/modeling_utils.py ``QuantConfig``
and ``PretrainedConfig``, tensorrt_llm/layers/moe.py ``MoeConfig``, models/{gpt,llama}/config.py per release.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from msgspec import Struct

from dist_export.errors import ExportError, Faults

RELEASES = ("0.12", "0.13", "0.14", "0.15", "0.16", "0.17", "0.18", "0.19", "0.20", "0.21", "1.0", "1.1", "1.2")
"""Stable releases with the engine builder, oldest first; 1.3 loads Hugging Face folders instead."""


class Span(Struct, frozen=True):
    """The releases, both ends included, that accept a key."""

    first: str = RELEASES[0]
    last: str = RELEASES[-1]

    def __contains__(self, release: object) -> bool:
        return RELEASES.index(self.first) <= RELEASES.index(str(release)) <= RELEASES.index(self.last)

    def __str__(self) -> str:
        return described((self.first, self.last))


ALL = Span()

NESTED_KEYS: Mapping[str, Mapping[str, Span]] = {
    "mapping": {
        **dict.fromkeys(("world_size", "gpus_per_node", "tp_size", "pp_size", "cp_size"), ALL),
        **dict.fromkeys(("moe_tp_size", "moe_ep_size"), ALL),
        "cp_config": Span("0.17"),
        **dict.fromkeys(("moe_cluster_size", "attn_tp_size", "attn_cp_size", "enable_attention_dp"), Span("1.0")),
        "auto_parallel": Span("1.0", "1.0"),
        **dict.fromkeys(("pp_partition", "enable_lm_head_tp_in_adp"), Span("1.1")),
    },
    "quantization": {
        **dict.fromkeys(("quant_algo", "kv_cache_quant_algo", "group_size", "smoothquant_val", "clamp_val"), ALL),
        **dict.fromkeys(("has_zero_point", "pre_quant_scale", "exclude_modules"), ALL),
        "use_meta_recipe": Span("0.15"),
        "mamba_ssm_cache_dtype": Span("1.1"),
    },
    "moe": {
        **dict.fromkeys(("num_experts", "top_k", "normalization_mode"), ALL),
        "moe_intermediate_size": Span("0.14", "0.15"),
        "num_shared_experts": Span("0.14", "0.15"),
        "sparse_mixer_epsilon": Span("0.14"),
        "shared_expert_intermediate_size": Span("0.16"),
        **dict.fromkeys(("device_limited_n_group", "device_limited_topk_group"), Span("0.15")),
        "device_limited_routed_scaling_factor": Span("0.15"),
    },
}
"""Nested table -> key -> releases whose constructor takes it. A key not listed is forbidden everywhere."""

COMMON_KEYS = (
    *("architecture", "dtype", "logits_dtype", "vocab_size", "hidden_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "head_size", "intermediate_size", "hidden_act", "norm_epsilon"),
    *("position_embedding_type", "max_position_embeddings", "mapping", "quantization", "use_parallel_embedding"),
    *("embedding_sharding_dim", "qk_layernorm", "rotary_base", "rotary_scaling", "moe"),
)
"""Top-level keys of every model class."""


class Keys(Struct, frozen=True):
    """The keys of a model class at the top level of config.json."""

    required: tuple[str, ...]
    """Without one of these some release falls back to a default that may be wrong for the model."""
    permitted: tuple[str, ...] = ()


def parse_release(text: str) -> str:
    """``0.14``, ``0.14.0`` or ``v1.0.0rc2`` -> the release line; `ExportError` lists those that can be served."""
    match = re.match(r"v?(\d+\.\d+)", text)
    if match and match[1] in RELEASES:
        return match[1]
    raise ExportError(
        f"--trtllm-version {text}: not a TensorRT-LLM release with an engine builder; known: {', '.join(RELEASES)}. "
        "Later releases load Hugging Face folders"
    )


def split_layers(num_layers: int, pp_size: int, releases: Sequence[str]) -> tuple[int, ...]:
    """Layers per pipeline stage as the given releases divide them.

    Raises `ExportError` when they disagree: up to 0.17 every stage takes ``num_layers // pp`` layers and the
    rest is dropped (mapping.py, ``Mapping.pp_layers``), from 1.0 the first stages take one more.
    """
    if pp_size > num_layers:
        raise ExportError(f"pp {pp_size} is more than the model's {num_layers} layers")
    base, extra = divmod(num_layers, pp_size)
    if extra and not all(RELEASES.index(release) >= RELEASES.index("1.0") for release in releases):
        raise ExportError(
            f"{num_layers} layers do not divide by pp {pp_size}: TensorRT-LLM up to 0.17 gives every stage {base} "
            f"layers and drops the last {extra}, from 1.0 on the first {extra} stages take {base + 1}. Choose a pp "
            "that divides the layers, or --trtllm-version 1.0 or later to export for those releases only"
        )
    return tuple(base + (stage < extra) for stage in range(pp_size))


def check_config(config: Mapping[str, object], keys: Keys, releases: Sequence[str]) -> None:
    """Raise one `ExportError` when some release would refuse or misread a config.json."""
    faults = Faults(f"config.json does not suit TensorRT-LLM {described(releases)}")
    for table, spans in NESTED_KEYS.items():
        nested = config.get(table)
        for key in nested if isinstance(nested, Mapping) else ():
            refusing = [release for release in releases if release not in spans.get(key, ())]
            if refusing:
                faults.add(f"{table}.{key} is refused by {', '.join(refusing)}")
    faults.extend(f"{key} is missing" for key in keys.required if key not in config)
    known = {*keys.required, *keys.permitted}
    faults.extend(f"{key} is not a field of {config['architecture']}" for key in config if key not in known)
    faults.raise_if_any()


def described(releases: Sequence[str]) -> str:
    """``0.12 to 1.2``, or the one release."""
    return " to ".join(dict.fromkeys((releases[0], releases[-1])))
