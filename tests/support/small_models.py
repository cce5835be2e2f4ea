"""Small random models as Megatron keeps them, and the parts of them that every consumer knows by another name."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

LLAMA = {"normalization": "RMSNorm", "swiglu": True, "position_embedding_type": "rope", "add_bias_linear": False}
GPT = {"normalization": "LayerNorm", "position_embedding_type": "learned_absolute", "add_bias_linear": True}
NEMOTRON = {
    "normalization": "LayerNorm",
    "layernorm_zero_centered_gamma": True,
    "squared_relu": True,
    "position_embedding_type": "rope",
    "rotary_percent": 0.5,
    "add_bias_linear": False,
}
_DEFAULTS: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 32,
    "ffn_hidden_size": 48,
    "num_attention_heads": 4,
    "group_query_attention": True,
    "num_query_groups": 2,
    "kv_channels": 8,
    "layernorm_epsilon": 1e-5,
    "layernorm_zero_centered_gamma": False,
    "add_qkv_bias": False,
    "swiglu": False,
    "squared_relu": False,
    "bias_gelu_fusion": False,
    "use_legacy_models": False,
    "rotary_base": 10000,
    "rotary_percent": 1.0,
    "use_rope_scaling": False,
    "rotary_seq_len_interpolation_factor": None,
    "max_position_embeddings": 64,
    "untie_embeddings_and_output_weights": True,
    "padded_vocab_size": 64,
    "num_experts": None,
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
}


@dataclass
class SmallModel:
    """Random weights under Megatron's stacked names, and the arguments that go with them."""

    args: dict[str, Any]
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def groups(self) -> int:
        return self.args["num_query_groups"]

    def layer(self, number: int, name: str) -> torch.Tensor:
        """A tensor of one layer: ``mlp.linear_fc2.weight``."""
        return self.tensors["decoder.layers." + name][number]

    def qkv(self, number: int, kind: str = "weight") -> list[torch.Tensor]:
        """Query, key and value of a layer, by reshaping: groups x (heads per group + 2) x head size."""
        fused = self.layer(number, "self_attention.linear_qkv." + kind)
        grouped = fused.reshape(self.groups, -1, self.args["kv_channels"], *fused.shape[1:])
        return [part.reshape(-1, *fused.shape[1:]) for part in (grouped[:, :-2], grouped[:, -2], grouped[:, -1])]

    def per_layer(self) -> dict[str, torch.Tensor]:
        """The same tensors with a key per layer."""
        result = {}
        for name, tensor in self.tensors.items():
            if name.startswith("decoder.layers."):
                rest = name.removeprefix("decoder.layers.")
                result |= {f"decoder.layers.{layer}.{rest}": part.clone() for layer, part in enumerate(tensor)}
            else:
                result[name] = tensor
        return result


def small_model(
    style: dict[str, Any], *, dtype: torch.dtype = torch.bfloat16, scale: float = 1.0, seed: int = 0, **args: Any
) -> SmallModel:
    """A random model; `args` are Megatron's and replace those of `style`."""
    model = SmallModel({**_DEFAULTS, **style, **args})
    generator = torch.Generator().manual_seed(seed)
    for name, shape in _shapes(model.args).items():
        values = torch.randn(shape, generator=generator) * scale
        model.tensors[name] = values.to(dtype)
    return model


def _shapes(a: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, ffn, num_layers = a["hidden_size"], a["ffn_hidden_size"], a["num_layers"]
    heads_size = a["num_attention_heads"] * a["kv_channels"]
    qkv_rows = heads_size + 2 * a["num_query_groups"] * a["kv_channels"]
    fc1_rows = 2 * ffn if a["swiglu"] or a.get("gated_linear_unit") else ffn
    layer: dict[str, tuple[int, ...]] = {
        **_norm(a, "self_attention.linear_qkv.layer_norm_"),
        "self_attention.linear_qkv.weight": (qkv_rows, hidden),
        "self_attention.linear_proj.weight": (hidden, heads_size),
        **_norm(a, "mlp.linear_fc1.layer_norm_"),
        "mlp.linear_fc1.weight": (fc1_rows, hidden),
        "mlp.linear_fc2.weight": (hidden, ffn),
    }
    if a["add_bias_linear"] or a["add_qkv_bias"]:
        layer["self_attention.linear_qkv.bias"] = (qkv_rows,)
    if a["add_bias_linear"]:
        layer |= {"self_attention.linear_proj.bias": (hidden,), "mlp.linear_fc1.bias": (fc1_rows,)}
        layer["mlp.linear_fc2.bias"] = (hidden,)
    shapes: dict[str, tuple[int, ...]] = {"embedding.word_embeddings.weight": (a["padded_vocab_size"], hidden)}
    if a["position_embedding_type"] == "learned_absolute":
        shapes["embedding.position_embeddings.weight"] = (a["max_position_embeddings"], hidden)
    shapes |= {f"decoder.layers.{name}": (num_layers, *shape) for name, shape in layer.items()}
    shapes |= _norm(a, "decoder.final_layernorm.")
    if a["untie_embeddings_and_output_weights"]:
        shapes["output_layer.weight"] = (a["padded_vocab_size"], hidden)
    return shapes


def _norm(a: dict[str, Any], prefix: str) -> dict[str, tuple[int, ...]]:
    kinds = ("weight", "bias") if a["normalization"] == "LayerNorm" else ("weight",)
    return {prefix + kind: (a["hidden_size"],) for kind in kinds}


def model_config(**changes: Any) -> Any:
    """A Llama-style `ModelConfig` with a few fields changed."""
    from dist_export.models.config import ModelConfig

    fields: dict[str, Any] = {
        "num_layers": 2,
        "hidden_size": 8,
        "ffn_hidden_size": 12,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "head_size": 2,
        "activation": "silu",
        "gated": True,
        "normalization": "RMSNorm",
        "zero_centered_norm": False,
        "norm_epsilon": 1e-5,
        "linear_bias": False,
        "qkv_bias": False,
        "position_embedding": "rope",
        "max_position_embeddings": 16,
        "tied_embeddings": False,
        "padded_vocab_size": 16,
        "vocab_size": 13,
    }
    return ModelConfig(**{**fields, **changes})
