"""What latent attention of a TensorRT-LLM checkpoint computes, rank by rank, in plain torch.

The attention plugin has two ways (cpp/tensorrt_llm/plugins/gptAttentionCommon, ``mlaPreContext`` and
``mlaGeneration``): of a prompt it makes queries, keys and values of whole heads, by ``q_b_proj`` and ``kv_b_proj``; for
generated tokens it leaves keys and values in the latent that is cached, makes queries of the latent's size by
``fused_q_proj``, and takes the values out of what attention returns. Both are computed here. Rotated elements are
neighbours (kernels/mlaKernels.cu).

Importing this module imports torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from msgspec import Struct
from torch.nn import functional

from dist_export.verify import trace as at
from dist_export.verify.trtllm_deepseek import Latent

Load = Callable[[str], torch.Tensor]
"""A tensor of the attention, by its name in it."""
Rotate = Callable[[torch.Tensor], torch.Tensor]
"""Heads [batch, position, head, rotated size], rotated by their positions."""


class Heads(Struct, frozen=True):
    """What a rank's heads attend with; unrotated elements first."""

    query: torch.Tensor
    """[batch, position, head, head size]"""
    key: torch.Tensor
    value: torch.Tensor
    absorbed: torch.Tensor
    """Queries of generated tokens, [batch, position, head, latent and rotated size]."""
    cache: torch.Tensor
    """Their keys, the same for all heads; without the rotated part the values too: [batch, position, 1, same size]."""
    value_weight: torch.Tensor
    """[head, value size, latent size]"""


def heads_of(latent: Latent, load: Load, rotate: Rotate, x: torch.Tensor) -> Heads:
    """The heads of one rank, of the attention's input x [batch, position, hidden]."""
    sizes = [latent.q_lora_rank, latent.kv_lora_rank, latent.rope_size]
    query, compressed, rotated = torch.split(functional.linear(x, load("fused_a.weight")), sizes, -1)
    query = _normed(latent, load("q_a_layernorm.weight"), query) if latent.q_lora_rank else x
    compressed = _normed(latent, load("kv_a_layernorm.weight"), compressed)[:, :, None]
    rotated = rotate(rotated[:, :, None])

    def queries(name: str) -> torch.Tensor:
        heads = _heads(latent, functional.linear(query, load(name)))
        return torch.cat((heads[..., : -latent.rope_size], rotate(heads[..., -latent.rope_size :])), -1)

    rows = [latent.num_heads * size for size in (latent.nope_size, latent.value_size)]
    keys, values = torch.split(load("kv_b_proj"), rows)
    key, value = (_heads(latent, functional.linear(compressed[:, :, 0], weight)) for weight in (keys, values))
    return Heads(
        query=queries("q_b_proj"),
        key=torch.cat((key, rotated.expand(-1, -1, latent.num_heads, -1)), -1),
        value=value,
        absorbed=queries("fused_q_proj"),
        cache=torch.cat((compressed, rotated), -1),
        value_weight=values.reshape(latent.num_heads, -1, values.shape[-1]),
    )


def _heads(latent: Latent, x: torch.Tensor) -> torch.Tensor:
    return x.reshape(*x.shape[:-1], latent.num_heads, -1)


def _normed(latent: Latent, weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return functional.rms_norm(x, weight.shape, weight, latent.epsilon)


def attend(latent: Latent, heads: Heads, num_prompt: int) -> torch.Tensor:
    """[batch, position, value heads side by side]: the first `num_prompt` positions are a prompt, the others
    generated."""
    n = num_prompt
    prompt = _causal(latent, heads.query[:, :n], heads.key[:, :n], heads.value[:, :n])
    key = heads.cache.expand(-1, -1, latent.num_heads, -1)
    latents = _causal(latent, heads.absorbed[:, n:], key, key[..., : latent.kv_lora_rank])
    generated = torch.einsum("bphl,hvl->bphv", latents, heads.value_weight)
    return torch.cat((prompt, generated), 1).flatten(2)


def _causal(latent: Latent, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Causal attention, of the last of the keys' positions."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
    return functional.scaled_dot_product_attention(q, k, v, seen, scale=latent.scale).transpose(1, 2)


SOURCES = {
    at.QUERY: "attention.q_b_proj",
    at.KEY: "attention.kv_b_proj (key rows), attention.fused_a",
    at.VALUE: "attention.kv_b_proj (value rows)",
    at.GENERATION_QUERY: "attention.fused_q_proj",
}
"""States of a rank's heads, and the tensors that make them."""


def state(latent: Latent, heads: Heads, name: str) -> torch.Tensor:
    """A state, its rotated elements as Megatron has them after rotation: the first of all pairs, then the second."""
    if name == at.VALUE:
        return heads.value
    found = {at.QUERY: heads.query, at.KEY: heads.key, at.GENERATION_QUERY: heads.absorbed}[name]
    rotated = found[..., -latent.rope_size :]
    return torch.cat((found[..., : -latent.rope_size], rotated[..., ::2], rotated[..., 1::2]), -1)


def angles(latent: Latent, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(cos, sin) [position, pair] by yarn (functional.py, ``RopeEmbeddingUtils``, for DeepSeek's attention plugin)."""
    scaling, size, base = latent.scaling, latent.rope_size, latent.rotary_base

    def border(turns: float) -> float:
        positions = scaling["original_max_position_embeddings"]
        return size * math.log(positions / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = max(math.floor(border(scaling["beta_fast"])), 0), min(math.ceil(border(scaling["beta_slow"])), size - 1)
    slow = ((torch.arange(size // 2, dtype=torch.float32) - low) / ((high - low) or 0.001)).clamp(0, 1)
    frequencies = 1.0 / base ** (torch.arange(0, size, 2, dtype=torch.float32) / size)
    turned = torch.outer(positions.float(), frequencies * (slow / scaling["factor"] + 1 - slow))
    magnitude = latent.magnitude(scaling["mscale"]) / latent.magnitude(scaling["mscale_all_dim"])
    return turned.cos() * magnitude, turned.sin() * magnitude
