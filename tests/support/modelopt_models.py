"""Models that ModelOpt quantised as transformers models, and the Megatron checkpoints that are the same models.

Weights are made of integers, so that they are the same on every machine; what calibration found is recorded
(tests/quantization/record_modelopt.py). Only that script needs ModelOpt and transformers.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

E4M3, E2M1 = (4, 3), (2, 1)


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama or Mixtral."""

    hidden: int
    ffn: int
    num_experts: int = 0
    num_layers: int = 2
    heads: int = 4
    groups: int = 2
    vocab: int = 256

    @property
    def head_size(self) -> int:
        return self.hidden // self.heads


DENSE, MOE = Shape(256, 512), Shape(128, 256, num_experts=4)


def numbers(name: str, *shape: int) -> torch.Tensor:
    """Uniform values below 1/8 in bf16, by name."""
    generator = np.random.default_rng(zlib.crc32(name.encode()))
    values = generator.integers(-(1 << 11), 1 << 11, shape).astype(np.float32) / (1 << 14)
    factor = 1.75 if name.endswith(("q_proj.weight", "gate_proj.weight", "w1.weight")) else 1.0
    if ".experts." in name:
        factor *= 1 + int(name.split(".experts.")[1][0]) / 8
    return torch.from_numpy(values * np.float32(factor)).to(torch.bfloat16)


def transformers_weights(shape: Shape) -> dict[str, torch.Tensor]:
    """Under the names of LlamaForCausalLM and MixtralForCausalLM."""
    h, kv = shape.hidden, shape.groups * shape.head_size
    table = (shape.vocab, h)
    sizes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": table, "lm_head.weight": table}
    norms = ["model.norm.weight"]
    for layer in range(shape.num_layers):
        head = f"model.layers.{layer}."
        norms += [f"{head}input_layernorm.weight", f"{head}post_attention_layernorm.weight"]
        sizes |= {f"{head}self_attn.{name}_proj.weight": (h if name in "qo" else kv, h) for name in "qkvo"}
        if shape.num_experts:
            sizes[f"{head}block_sparse_moe.gate.weight"] = (shape.num_experts, h)
        for part, size in _mlp(shape).items():
            sizes[f"{head}{part}.weight"] = size
    found = {name: numbers(name, *size) for name, size in sizes.items()}
    return found | {name: (1 + numbers(name, h).float()).to(torch.bfloat16) for name in norms}


def _mlp(shape: Shape) -> dict[str, tuple[int, int]]:
    up, down = (shape.ffn, shape.hidden), (shape.hidden, shape.ffn)
    if not shape.num_experts:
        return {"mlp.gate_proj": up, "mlp.up_proj": up, "mlp.down_proj": down}
    head = "block_sparse_moe.experts."
    return {
        f"{head}{expert}.{name}": size
        for expert in range(shape.num_experts)
        for name, size in (("w1", up), ("w3", up), ("w2", down))
    }


def groups(shape: Shape) -> dict[str, list[str]]:
    """Megatron's linears without ``decoder.layers.`` -> those of transformers that they are made of."""
    found = {}
    for layer in range(shape.num_layers):
        head = f"model.layers.{layer}."
        found[f"{layer}.self_attention.linear_qkv"] = [f"{head}self_attn.{name}_proj" for name in "qkv"]
        found[f"{layer}.self_attention.linear_proj"] = [f"{head}self_attn.o_proj"]
        if not shape.num_experts:
            found[f"{layer}.mlp.linear_fc1"] = [f"{head}mlp.gate_proj", f"{head}mlp.up_proj"]
            found[f"{layer}.mlp.linear_fc2"] = [f"{head}mlp.down_proj"]
        for expert in range(shape.num_experts):
            own, mine = f"{layer}.mlp.experts.experts.{expert}.", f"{head}block_sparse_moe.experts.{expert}."
            found |= {f"{own}linear_fc1": [f"{mine}w1", f"{mine}w3"], f"{own}linear_fc2": [f"{mine}w2"]}
    return found


def fused(shape: Shape, name: str, parts: list[torch.Tensor]) -> torch.Tensor:
    """Rows of a Megatron linear out of those of its parts: query heads, key and value of each group; gate, then up."""
    if len(parts) < 3:
        return torch.cat(parts)
    grouped = [part.reshape(shape.groups, -1, *part.shape[1:]) for part in parts]
    return torch.cat(grouped, 1).reshape(-1, *parts[0].shape[1:])


def megatron_tensors(shape: Shape, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The model under Megatron's names, a key per layer and expert."""
    moe = "pre_mlp_layernorm.weight" if shape.num_experts else "mlp.linear_fc1.layer_norm_weight"
    found = {
        "embedding.word_embeddings.weight": weights["model.embed_tokens.weight"],
        "output_layer.weight": weights["lm_head.weight"],
        "decoder.final_layernorm.weight": weights["model.norm.weight"],
    }
    for layer in range(shape.num_layers):
        head, own = f"model.layers.{layer}.", f"decoder.layers.{layer}."
        found[f"{own}self_attention.linear_qkv.layer_norm_weight"] = weights[f"{head}input_layernorm.weight"]
        found[own + moe] = weights[f"{head}post_attention_layernorm.weight"]
        if shape.num_experts:
            found[f"{own}mlp.router.weight"] = weights[f"{head}block_sparse_moe.gate.weight"]
    for name, parts in groups(shape).items():
        found[f"decoder.layers.{name}.weight"] = fused(shape, name, [weights[f"{part}.weight"] for part in parts])
    return found


def megatron_arguments(shape: Shape) -> dict[str, Any]:
    """What Megatron saves of such a model."""
    from support.small_models import LLAMA, small_model

    sizes: dict[str, Any] = {
        "num_layers": shape.num_layers,
        "hidden_size": shape.hidden,
        "ffn_hidden_size": shape.ffn,
        "num_attention_heads": shape.heads,
        "num_query_groups": shape.groups,
        "kv_channels": shape.head_size,
        "padded_vocab_size": shape.vocab,
        "max_position_embeddings": 128,
    }
    if shape.num_experts:
        sizes |= {"num_experts": shape.num_experts, "moe_router_topk": 2, "moe_layer_freq": 1}
        sizes["moe_ffn_hidden_size"] = shape.ffn
    return small_model(LLAMA, **sizes).args


def smoothed(weight: torch.Tensor, factor: torch.Tensor | None) -> torch.Tensor:
    """What is stored of a linear whose input is multiplied by `factor`."""
    return weight if factor is None else (weight.float() / factor.float()).to(weight.dtype)
