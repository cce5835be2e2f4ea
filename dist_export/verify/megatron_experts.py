"""Megatron-Core's mixture of experts on the CPU: its configuration, what has to be stood in for, what is watched.

Importing this module imports torch; megatron-core is imported when it runs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from dist_export.models.config import ModelConfig


def unsupported(config: ModelConfig) -> Iterator[str]:
    """Why a model's experts are not built here."""
    if config.moe_glu_interleave_size:
        yield "gate and up rows of its experts alternate"


def transformer_fields(config: ModelConfig) -> dict[str, Any]:
    """Fields of TransformerConfig. Tokens are not sent anywhere, so the dispatcher is the one that needs no GPU."""
    if not config.num_experts:
        return {}
    return {
        "num_moe_experts": config.num_experts,
        "moe_router_topk": config.moe_top_k,
        "moe_ffn_hidden_size": config.moe_ffn_hidden_size,
        "moe_shared_expert_intermediate_size": config.moe_shared_expert_ffn_hidden_size or None,
        "moe_shared_expert_gate": config.moe_shared_expert_gate,
        "moe_router_pre_softmax": config.moe_router_pre_softmax,
        "moe_router_score_function": config.moe_router_score_function,
        "moe_router_num_groups": config.moe_router_num_groups,
        "moe_router_group_topk": config.moe_router_group_top_k,
        "moe_router_topk_scaling_factor": config.moe_router_scaling_factor,
        "moe_router_enable_expert_bias": config.moe_router_expert_bias,
        "moe_router_load_balancing_type": "none",
        "moe_token_dispatcher_type": "allgather",
        "moe_grouped_gemm": False,
    }


@contextlib.contextmanager
def without_fused_router() -> Iterator[None]:
    """0.16 looks a function of TransformerEngine up by name even where that is not installed."""
    from megatron.core.transformer.moe import moe_utils

    name = "te_general_gemm"
    missing = not hasattr(moe_utils, name)
    if missing:
        setattr(moe_utils, name, None)
    try:
        yield
    finally:
        if missing:
            delattr(moe_utils, name)


def watch_router(router: torch.nn.Module, record: Callable[[torch.Tensor], None]) -> None:
    """Hand what each token gets of each expert, [batch, position, expert], to `record` as the router decides it."""

    def hook(_: object, arguments: tuple[torch.Tensor, ...], result: tuple[torch.Tensor, torch.Tensor]) -> None:
        length, batch = arguments[0].shape[:2]
        record(result[0].reshape(length, batch, -1).transpose(0, 1))

    router.register_forward_hook(hook)
