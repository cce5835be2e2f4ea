"""What the experts of a TensorRT-LLM checkpoint compute, rank by rank, in plain torch (tensorrt_llm/layers/moe.py).

Importing this module imports torch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional

from dist_export.verify.trtllm_experts import ROUTER, SHARED_EXPERT_IN_MLP, Experts
from dist_export.verify.trtllm_files import RankFile

Activation = Callable[[torch.Tensor], torch.Tensor]


def router_weights(experts: Experts, file: RankFile, prefix: str, x: torch.Tensor) -> torch.Tensor:
    """How much of each expert a token of x [batch, position, hidden] gets: [batch, position, expert], mostly zeros."""
    logits = functional.linear(x.float(), file.load(prefix + ROUTER))
    scores, chosen = logits.softmax(-1).topk(experts.top_k, -1)
    if experts.renormalize:
        scores = scores / scores.sum(-1, keepdim=True)
    return torch.zeros_like(logits).scatter(-1, chosen, scores)


def rank_output(
    experts: Experts, rank: int, file: RankFile, prefix: str, x: torch.Tensor, weights: torch.Tensor, act: Activation
) -> torch.Tensor:
    """What one tp rank adds to the all-reduce: its experts' output, and that of its part of the shared expert."""
    total = torch.zeros_like(x)
    for local in range(experts.num_local):
        share = weights[..., experts.first(rank) + local, None].to(x.dtype)
        fc, proj = (file.load_one(f"{prefix}mlp.{name}.weight", local).to(x.dtype) for name in ("fc", "proj"))
        total = total + share * _fused_mlp(x, fc, proj, act)
    if experts.shared_ffn_size:
        total = total + _shared_output(file, prefix, x, act)
    return total


def _fused_mlp(x: torch.Tensor, fc: torch.Tensor, proj: torch.Tensor, act: Activation) -> torch.Tensor:
    """The first half of ``fc`` is linear, the second is activated (functional.py, ``swiglu``)."""
    linear, activated = functional.linear(x, fc).chunk(2, -1)
    return functional.linear(linear * act(activated), proj)


def _shared_output(file: RankFile, prefix: str, x: torch.Tensor, act: Activation) -> torch.Tensor:
    prefix += SHARED_EXPERT_IN_MLP.removesuffix("shared_expert.fc.weight") if file.shared_in_mlp else ""
    gate = torch.sigmoid(functional.linear(x, file.load(prefix + "shared_expert_gate.weight").to(x.dtype)))
    fc, proj = (file.load(f"{prefix}shared_expert.{name}.weight").to(x.dtype) for name in ("fc", "proj"))
    return gate * _fused_mlp(x, fc, proj, act)


def sources(experts: Experts) -> str:
    """The tensors of a layer that make its output."""
    shared = ", shared_expert" if experts.shared_ffn_size else ""
    return f"mlp.router, mlp.fc, mlp.proj{shared}"
