"""Megatron modules of families that Megatron-Core alone does not have, on the CPU: Gemma's and Falcon's.

Their trainers put them in place of Megatron-Core's (Megatron-Bridge models/gemma/gemma2_provider.py, modules.py and
models/common/te_layers.py; NeMo nlp/models/language_modeling/megatron/falcon/falcon_decoder_layer.py); here they are
made of the local layer spec. Importing this module imports torch and megatron-core.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel import RowParallelLinear
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_layer import TransformerLayer

from dist_export.models.config import ModelConfig


class RowParallelLinearWithNorm(RowParallelLinear):  # type: ignore[misc]
    """A linear layer whose output is normed before the residual is added to it."""

    def __init__(self, input_size: int, output_size: int, *, config: Any, **options: Any) -> None:
        super().__init__(input_size, output_size, config=config, **options)
        self.post_layernorm = WrappedTorchNorm(config, output_size, eps=config.layernorm_epsilon)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        output, bias = super().forward(x)
        return self.post_layernorm(output), bias


class ParallelTransformerLayer(TransformerLayer):  # type: ignore[misc]
    """Attention and MLP side by side: ``x + attention(norm(x)) + mlp(norm(x))``, of one norm or of two."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **options: Any) -> tuple[torch.Tensor, None]:
        names = ("attention_mask", "rotary_pos_emb")
        normed = self.input_layernorm(hidden_states)
        shared = isinstance(self.pre_mlp_layernorm, IdentityOp)
        attended, attention_bias = self.self_attention(normed, **{name: options.get(name) for name in names})
        output, mlp_bias = self.mlp(normed if shared else self.pre_mlp_layernorm(hidden_states))
        for part in (attended, attention_bias, mlp_bias):
            output = output if part is None else output + part
        return hidden_states + output, None


def layer_spec(config: ModelConfig) -> Any:
    """The local layer spec with what `config` has beyond it."""
    spec = get_gpt_layer_local_spec(
        num_experts=config.num_experts or None,
        moe_grouped_gemm=False,
        normalization=config.normalization,
        qk_layernorm=config.qk_norm,
    )
    if config.post_norms:
        spec.submodules.self_attention.submodules.linear_proj = RowParallelLinearWithNorm
        spec.submodules.mlp.submodules.linear_fc2 = RowParallelLinearWithNorm
    if config.parallel_attention:
        spec.module = ParallelTransformerLayer
        spec.submodules.sharded_state_dict_keys_map = {}  # norms are modules of their own in NeMo's Falcon
        if not config.separate_mlp_norm:
            spec.submodules.pre_mlp_layernorm = IdentityOp
    return spec


def add_scaling_and_capping(model: Any, config: ModelConfig) -> None:
    """Have a GPTModel (a pipeline stage of one) scale its embeddings and cap scores and logits as `config` says."""
    if config.embedding_scaling and model.pre_process:
        model.embedding.register_forward_hook(lambda _, __, states: states * math.sqrt(config.hidden_size))
    if config.attn_logit_softcapping is not None:
        for layer in model.decoder.layers:
            attention = layer.self_attention.core_attention
            attention.scale_mask_softmax = _CappedSoftmax(attention.scale_mask_softmax, config.attn_logit_softcapping)
    if config.final_logit_softcapping is not None and model.post_process:
        cap = config.final_logit_softcapping
        model.output_layer.register_forward_hook(lambda _, __, result: (_capped(result[0], cap), result[1]))


class _CappedSoftmax(torch.nn.Module):
    def __init__(self, softmax: torch.nn.Module, cap: float) -> None:
        super().__init__()
        self.softmax, self.cap = softmax, cap

    def forward(self, scores: torch.Tensor, *args: Any) -> torch.Tensor:
        result: torch.Tensor = self.softmax(_capped(scores, self.cap), *args)
        return result


def _capped(x: torch.Tensor, cap: float) -> torch.Tensor:
    return cap * torch.tanh(x / cap)


def sliding_window_mask(num_queries: int, num_keys: int, window: tuple[int, int]) -> torch.Tensor:
    """transformer/utils.py, `get_sliding_window_causal_mask`, which makes it on a GPU: True hides."""
    seen = torch.ones(num_queries, num_keys, dtype=torch.bool)
    offset = num_keys - num_queries
    return ~seen.triu(offset - window[0]).tril(offset + window[1])
