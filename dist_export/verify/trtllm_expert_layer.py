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
    logits = functional.linear(x.float(), file.load(_inner(prefix, file) + ROUTER.removeprefix("mlp.")))
    scores, chosen = _limited(experts, logits.softmax(-1)).topk(experts.top_k, -1)
    if experts.renormalize:
        scores = scores / scores.sum(-1, keepdim=True)
    return torch.zeros_like(logits).scatter(-1, chosen, scores)


def _inner(prefix: str, file: RankFile) -> str:
    return prefix + ("mlp.moe." if file.experts_in_moe else "mlp.")


def _limited(experts: Experts, scores: torch.Tensor) -> torch.Tensor:
    """Scores of the experts outside the best groups are zero (``group_limited_greedy``)."""
    if experts.top_groups < experts.num_groups:
        groups = scores.reshape(*scores.shape[:-1], experts.num_groups, -1)
        best = groups.amax(-1)
        kept = torch.zeros_like(best).scatter(-1, best.topk(experts.top_groups, -1).indices, 1)
        scores = (groups * kept[..., None]).reshape(scores.shape)
    return scores * experts.scaling


def rank_output(
    experts: Experts, rank: int, file: RankFile, prefix: str, x: torch.Tensor, weights: torch.Tensor, act: Activation
) -> torch.Tensor:
    """What one tp rank adds to the all-reduce: its experts' output, and that of its part of the shared expert."""
    total, inner = torch.zeros_like(x), _inner(prefix, file)
    for local in range(experts.num_local):
        share = weights[..., experts.first(rank) + local, None].to(x.dtype)
        fc, proj = (file.load_one(f"{inner}{name}.weight", local).to(x.dtype) for name in ("fc", "proj"))
        total = total + share * _fused_mlp(x, fc, proj, act)
    if experts.shared_ffn_size:
        total = total + _shared_output(experts, file, prefix, x, act)
    return total


def _fused_mlp(x: torch.Tensor, fc: torch.Tensor, proj: torch.Tensor, act: Activation) -> torch.Tensor:
    """The first half of ``fc`` is linear, the second is activated (functional.py, ``swiglu``)."""
    linear, activated = functional.linear(x, fc).chunk(2, -1)
    return functional.linear(linear * act(activated), proj)


def _shared_output(experts: Experts, file: RankFile, prefix: str, x: torch.Tensor, act: Activation) -> torch.Tensor:
    if file.experts_in_moe:  # a gated MLP of its own, whose ``fc`` is the activated half
        names = (f"{prefix}mlp.shared_experts.{name}.weight" for name in ("fc", "gate", "proj"))
        activated, linear, proj = (file.load(name).to(x.dtype) for name in names)
        return functional.linear(act(functional.linear(x, activated)) * functional.linear(x, linear), proj)
    prefix += SHARED_EXPERT_IN_MLP.removesuffix("shared_expert.fc.weight") if file.shared_in_mlp else ""
    fc, proj = (file.load(f"{prefix}shared_expert.{name}.weight").to(x.dtype) for name in ("fc", "proj"))
    output = _fused_mlp(x, fc, proj, act)
    if not experts.shared_gate:
        return output
    gate = torch.sigmoid(functional.linear(x, file.load(prefix + "shared_expert_gate.weight").to(x.dtype)))
    return gate * output


def sources(experts: Experts) -> str:
    """The tensors of a layer that make its output."""
    shared = ", shared_expert" if experts.shared_ffn_size else ""
    return f"mlp.router, mlp.fc, mlp.proj{shared}"
