"""ModelConfig refuses what no model can be, in one message that names the numbers."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
from msgspec import structs

from dist_export.errors import ExportError
from dist_export.models.config import ModelConfig, RopeScaling

DENSE: dict[str, Any] = {
    "num_layers": 4,
    "hidden_size": 64,
    "ffn_hidden_size": 128,
    "num_attention_heads": 8,
    "num_query_groups": 2,
    "head_size": 8,
    "activation": "silu",
    "gated": True,
    "normalization": "RMSNorm",
    "zero_centered_norm": False,
    "norm_epsilon": 1e-5,
    "linear_bias": False,
    "qkv_bias": False,
    "position_embedding": "rope",
    "max_position_embeddings": 64,
    "tied_embeddings": False,
    "padded_vocab_size": 256,
    "vocab_size": 250,
}
MOE = DENSE | {"num_experts": 8, "moe_top_k": 2, "moe_ffn_hidden_size": 32}


def test_valid_configurations_are_values() -> None:
    config = ModelConfig(**DENSE, rope_scaling=RopeScaling("llama3", 8.0))
    assert pickle.loads(pickle.dumps(config)) == config
    assert hash(config) == hash(structs.replace(config))
    with pytest.raises(ExportError):  # msgspec checked nothing here before 0.21
        structs.replace(config, num_layers=0)
    with pytest.raises(AttributeError):
        config.num_layers = 5  # type: ignore[misc]
    assert ModelConfig(**MOE, moe_layer_freq=(0, 1, 1, 1)).moe_layer_freq == (0, 1, 1, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_query_groups": 3}, "num_attention_heads 8 is not a multiple of num_query_groups 3"),
        ({"num_layers": 0}, "num_layers is 0, must be positive"),
        ({"head_size": -8}, "head_size is -8, must be positive"),
        ({"vocab_size": 300}, "vocab_size 300 is above padded_vocab_size 256"),
        ({"norm_epsilon": 0.0}, "norm_epsilon is 0.0, must be a positive number"),
        ({"norm_epsilon": float("nan")}, "norm_epsilon is nan"),
        ({"rotary_percent": 1.5}, "rotary_percent is 1.5, must be at most 1"),
        ({"rotary_percent": 0.375}, "rotary_percent 0.375 of head_size 8 rotates 3 elements"),
        ({"activation": "swish"}, "activation is 'swish', must be one of gelu, gelu_tanh"),
        ({"normalization": "layernorm"}, "normalization is 'layernorm', must be one of LayerNorm, RMSNorm"),
        (
            {"position_embedding": "none", "rope_scaling": RopeScaling("linear", 2.0)},
            "rope_scaling is given but position_embedding is none",
        ),
        ({"window_size": 0}, "window_size is 0, must be positive"),
        ({"window_layers": (1, 0, 1, 0)}, "window_layers is given but window_size is not"),
        ({"window_size": 8, "window_layers": (1, 0)}, "window_layers has 2 entries for num_layers 4"),
        ({"attn_logit_softcapping": 0.0}, "attn_logit_softcapping is 0.0, must be a positive number"),
        ({"separate_mlp_norm": False}, "separate_mlp_norm is false but parallel_attention is not set"),
        ({"moe_layer_freq": (1, 1, 1, 1)}, "moe_layer_freq is given but num_experts is 0"),
        ({"num_experts": 4}, "moe_top_k 0 must lie in 1..num_experts 4"),
        (MOE | {"moe_top_k": 9}, "moe_top_k 9 must lie in 1..num_experts 8"),
        (MOE | {"moe_ffn_hidden_size": 0}, "moe_ffn_hidden_size is 0, must be positive"),
        (MOE | {"moe_layer_freq": (1, 0)}, "moe_layer_freq has 2 entries for num_layers 4"),
        (MOE | {"moe_layer_freq": (1, 0, 2, 1)}, "may hold only 0"),
        (MOE | {"moe_router_num_groups": 4}, "both or neither must be given"),
        (
            MOE | {"moe_router_num_groups": 3, "moe_router_group_top_k": 1},
            "num_experts 8 is not a multiple of moe_router_num_groups 3",
        ),
        (
            MOE | {"moe_router_num_groups": 2, "moe_router_group_top_k": 4},
            "moe_router_group_top_k 4 is above moe_router_num_groups 2",
        ),
        (MOE | {"moe_shared_expert_gate": True}, "moe_shared_expert_ffn_hidden_size is 0"),
    ],
)
def test_impossible_configurations_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ExportError) as error:
        ModelConfig(**(DENSE | change))
    assert message in str(error.value)


def test_all_faults_come_in_one_error() -> None:
    with pytest.raises(ExportError, match=r"(?s)2 faults.*num_layers is 0.*hidden_size is -1"):
        ModelConfig(**(DENSE | {"num_layers": 0, "hidden_size": -1}))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("dynamic", 4.0), "kind 'dynamic' is none of linear, llama3, yarn"),
        (("yarn", 0.5), "yarn wants factor 0.5 to be at least 1"),
        (("linear", 0.0), "factor 0.0 is not a positive number"),
        (("llama3", 8.0, 4.0, 4.0), "low_freq_factor 4.0 must be positive and below high_freq_factor 4.0"),
        (("llama3", 8.0, 1.0, 4.0, 0), "original_max_position_embeddings 0 is not positive"),
    ],
)
def test_impossible_rope_scaling_is_refused(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ExportError, match=message):
        RopeScaling(*arguments)
