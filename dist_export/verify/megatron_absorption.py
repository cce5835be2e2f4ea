"""Megatron-Core's latent attention with the keys' projection taken into the queries', as an export has it rounded.

A TensorRT-LLM export holds the product of both (attention.fused_q_proj), by which the engine makes the queries of
generated tokens. Scores are the same but for the rounding of that product, which is made here in the reference too.

Importing this module imports torch.
"""

from __future__ import annotations

from typing import Any

import torch

from dist_export.models.config import ModelConfig
from dist_export.verify import trace as at
from dist_export.verify.trace import Point, Trace


def absorb_keys(model: Any, config: ModelConfig, trace: Trace, *, dtype: torch.dtype, num_prompt: int) -> None:
    """Have every layer's tokens from `num_prompt` on attend by products rounded to `dtype`; all are recorded."""
    for number, layer in enumerate(model.decoder.layers):
        _Absorption(layer.self_attention, config, trace, Point(at.GENERATION_QUERY, number)).hook(dtype, num_prompt)


class _Absorption:
    """One layer's; Megatron has states as [position, batch, …]."""

    def __init__(self, attention: Any, config: ModelConfig, trace: Trace, point: Point) -> None:
        self.attention, self.num_nope, self.trace, self.point = attention, config.qk_nope_head_size, trace, point
        self.num_heads = config.num_attention_heads
        self.queries = attention.linear_q_up_proj if config.q_lora_rank else attention.linear_q_proj
        self.inputs: dict[Any, torch.Tensor] = {}

    def hook(self, dtype: torch.dtype, num_prompt: int) -> None:
        """Register with the attention's modules."""

        def keep(module: Any, arguments: tuple[torch.Tensor, ...]) -> None:
            self.inputs[module] = arguments[0]

        def replace(_: object, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
            query, key, *rest = arguments
            return *self._absorbed(query, key, dtype, num_prompt), *rest

        for module in (self.queries, self.attention.linear_kv_up_proj):
            module.register_forward_pre_hook(keep)
        self.attention.core_attention.register_forward_pre_hook(replace)

    def _absorbed(
        self, query: torch.Tensor, key: torch.Tensor, dtype: torch.dtype, num_prompt: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries and keys of more elements: a prompt's queries are zero at those of the latent, generated ones at
        those that are made of it."""
        keys = self.attention.linear_kv_up_proj
        weights = (module.weight.unflatten(0, (self.num_heads, -1)) for module in (self.queries, keys))
        product = torch.einsum("hdq,hdk->hkq", *(weight[:, : self.num_nope].double() for weight in weights))
        latent_query = torch.einsum("pbq,hkq->pbhk", self.inputs[self.queries], product.to(dtype).to(query.dtype))
        plain, rotated = query[..., : self.num_nope], query[..., self.num_nope :]
        self.trace.record(self.point, torch.cat((latent_query, rotated), -1).transpose(0, 1))
        generated = (torch.arange(query.shape[0]) >= num_prompt)[:, None, None, None]
        latents = self.inputs[keys][:, :, None].expand(-1, -1, self.num_heads, -1)
        self.inputs.clear()
        return (
            torch.cat((torch.where(generated, 0, plain), torch.where(generated, latent_query, 0), rotated), -1),
            torch.cat((key[..., : self.num_nope], latents, key[..., self.num_nope :]), -1),
        )
