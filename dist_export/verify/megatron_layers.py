"""Megatron-Core's own layers beyond the plain ones, on the CPU: latent attention, layers that differ, sinks, yarn.

megatron-core is imported when it is needed.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any

from dist_export.models.config import ModelConfig


def config_class(config: ModelConfig) -> Any:
    """The configuration class of a model's layers."""
    from megatron.core.transformer import MLATransformerConfig, TransformerConfig
    from megatron.core.transformer.heterogeneous.heterogeneous_config import HeterogeneousTransformerConfig

    if config.blocks is not None:
        return HeterogeneousTransformerConfig
    return MLATransformerConfig if config.kv_lora_rank else TransformerConfig


def fields(config: ModelConfig) -> dict[str, Any]:
    """Fields of that class."""
    found: dict[str, Any] = {
        "softmax_type": "learnable" if config.attention_sinks else "vanilla",
        "glu_linear_offset": config.glu_offset,
        "activation_func_clamp_value": config.activation_clamp,
    }
    if config.kv_lora_rank:
        found |= _latent_fields(config)
    if config.blocks is not None:
        found["heterogeneous_layers_config_encoded_json"] = _blocks_as_json(config)
    if config.moe_layer_freq is not None:
        found["moe_layer_freq"] = list(config.moe_layer_freq)
    return found


def _latent_fields(config: ModelConfig) -> dict[str, Any]:
    scaling = config.rope_scaling
    found = {
        "multi_latent_attention": True,
        "q_lora_rank": config.q_lora_rank or None,
        "kv_lora_rank": config.kv_lora_rank,
        "qk_head_dim": config.qk_nope_head_size,
        "qk_pos_emb_head_dim": config.qk_rope_head_size,
        "v_head_dim": config.value_head_size,
        "rotary_base": config.rotary_base,
        "rope_type": "rope" if scaling is None else "yarn",
    }
    if scaling is not None:
        names = ("original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
        found |= {"rotary_scaling_factor": scaling.factor, **{name: getattr(scaling, name) for name in names}}
    return found


def _blocks_as_json(config: ModelConfig) -> str:
    assert config.blocks is not None
    entries = [
        {
            part: {"no_op": kind == "no_op", "replace_with_linear": kind == "linear", name: size or None}
            for part, name, kind, size in (
                ("attention", "num_query_groups", block.attention, block.num_query_groups),
                ("mlp", "ffn_hidden_size", block.mlp, block.ffn_hidden_size),
            )
        }
        for block in config.blocks.layers
    ]
    return json.dumps({"block_configs": entries})


def add_yarn(transformer_config: Any, config: ModelConfig) -> str:
    """Set the attributes that GPTModel reads for yarn; returns its position_embedding_type."""
    scaling = config.rope_scaling
    if config.kv_lora_rank or scaling is None or scaling.kind != "yarn":
        return config.position_embedding
    numbers = {
        "rotary_scaling_factor": scaling.factor,
        "correction_range_round_to_int": scaling.truncate,
        **{name: getattr(scaling, name) for name in ("original_max_position_embeddings", "beta_fast", "beta_slow")},
        **{name: getattr(scaling, name) for name in ("mscale", "mscale_all_dim")},
    }
    for name, value in numbers.items():
        setattr(transformer_config, f"yarn_{name}", value)
    return "yarn"


def block_spec(transformer_config: Any, config: ModelConfig) -> Any | None:
    """The local spec of all layers where they are not the plain ones; None where they are."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.models.gpt.heterogeneous.heterogeneous_layer_specs import get_gpt_heterogeneous_layer_spec

    if config.blocks is not None:
        return get_gpt_heterogeneous_layer_spec(transformer_config, False)
    if config.kv_lora_rank or config.moe_layer_freq is not None:
        return get_gpt_decoder_block_spec(transformer_config, False, normalization=config.normalization)
    return None


@contextlib.contextmanager
def latent_attention_on_cpu() -> Iterator[None]:
    """What latent attention of 0.16 needs without TransformerEngine: its classes to compare with, and core attention
    whose values have a size of their own."""
    from megatron.core.transformer import dot_product_attention
    from megatron.core.transformer import multi_latent_attention as latent

    core = dot_product_attention.DotProductAttention
    missing = {name: getattr(latent, name, None) for name in ("TELinear", "TEColumnParallelLinear", "Linear")}
    plain = core.__init__

    def with_value_size(self: Any, *args: Any, k_channels: int = 0, v_channels: int = 0, **options: Any) -> None:
        plain(self, *args, **options)
        if v_channels:
            self.hidden_size_per_partition = v_channels * self.num_attention_heads_per_partition

    for name, found in missing.items():
        if not isinstance(found, type):
            setattr(latent, name, type(name, (), {}))
    core.__init__ = with_value_size
    try:
        yield
    finally:
        core.__init__ = plain
        for name, found in missing.items():
            setattr(latent, name, found)
