"""What tests of live models say of `support.small_models.small_model(LLAMA)` where they have no GPTModel."""

from __future__ import annotations

import dataclasses

import torch

_FIELDS = {
    "num_layers": 2,
    "hidden_size": 32,
    "ffn_hidden_size": 48,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "kv_channels": 8,
    "normalization": "RMSNorm",
    "layernorm_epsilon": 1e-5,
    "gated_linear_unit": True,
    "activation_func": torch.nn.functional.silu,
    "add_bias_linear": False,
    "params_dtype": torch.bfloat16,
}
CONFIGURATION = dataclasses.make_dataclass("Configuration", _FIELDS)(**_FIELDS)
"""The fields of a TransformerConfig that the model needs."""
MODEL_FIELDS = {
    "position_embedding_type": "rope",
    "max_position_embeddings": 64,
    "share_embeddings_and_output_weights": False,
}
"""Parameters of its GPTModel."""
