"""DeepSeek-V2 of a TensorRT-LLM checkpoint: what config.json says of it, and its layers' shapes.

Written from tensorrt_llm/models/deepseek_v2/model.py, layers/attention.py (``DeepseekV2Attention``) and layers/moe.py
(``SharedMoE``) of 0.15 and 0.16 alone, without the exporter's rules.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from msgspec import Struct

from dist_export.verify.trtllm_experts import DEVICE_LIMITED, Experts

DEEPSEEK_CLASS = ("DeepseekV2ForCausalLM",)
YARN = ("factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "original_max_position_embeddings")
"""What the attention reads of ``rotary_scaling``, of every model."""
_EXPERTS = "moe_num_experts"
_TABLE = {
    "num_experts": _EXPERTS,
    "top_k": "moe_top_k",
    "normalization_mode": "moe_renorm_mode",
    "device_limited_n_group": "moe_n_group",
    "device_limited_topk_group": "moe_topk_group",
    "device_limited_routed_scaling_factor": "moe_routed_scaling_factor",
}
"""Fields of the table ``moe``, and those of the configuration that say the same; which are read depends on the
release."""


class Latent(Struct, frozen=True):
    """Latent attention of one rank."""

    hidden_size: int
    num_heads: int
    """Of this rank."""
    q_lora_rank: int
    """Zero where queries are made of the hidden states themselves (V2-Lite)."""
    kv_lora_rank: int
    nope_size: int
    """Elements of a query or key head that are not rotated; they come first."""
    rope_size: int
    value_size: int
    epsilon: float
    """Of the norms of both latents."""
    rotary_base: float
    scaling: Mapping[str, float]
    """Yarn's numbers."""

    @staticmethod
    def of(raw: Mapping[str, Any], tp_size: int) -> Latent:
        """What a config.json asks for."""
        return Latent(
            hidden_size=int(raw["hidden_size"]),
            num_heads=int(raw["num_attention_heads"]) // tp_size,
            q_lora_rank=int(raw["q_lora_rank"] or 0),
            kv_lora_rank=int(raw["kv_lora_rank"]),
            nope_size=int(raw["qk_nope_head_dim"]),
            rope_size=int(raw["qk_rope_head_dim"]),
            value_size=int(raw["v_head_dim"]),
            epsilon=float(raw["norm_epsilon"]),
            rotary_base=float(raw["rotary_base"]),
            scaling={name: float(raw["rotary_scaling"][name]) for name in YARN},
        )

    @property
    def scale(self) -> float:
        """Of the scores: ``q_scaling`` is set by mscale_all_dim, the plugin takes the size of a whole head."""
        size = math.sqrt(self.nope_size + self.rope_size)
        return self.magnitude(self.scaling["mscale_all_dim"]) ** 2 / size

    def magnitude(self, mscale: float) -> float:
        """Yarn's factor for a coefficient; one for a coefficient of zero, or without scaling."""
        factor = self.scaling["factor"]
        return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name within a layer -> shape of the attention's tensors; norms and down-projections are whole."""
        heads, latent, rope = self.num_heads, self.kv_lora_rank, self.rope_size
        inputs = self.q_lora_rank or self.hidden_size
        parts: dict[str, tuple[int, ...]] = {
            "fused_a.weight": (self.q_lora_rank + latent + rope, self.hidden_size),
            "kv_a_layernorm.weight": (latent,),
            "q_b_proj": (heads * (self.nope_size + rope), inputs),
            "fused_q_proj": (heads * (latent + rope), inputs),
            "kv_b_proj": (heads * (self.nope_size + self.value_size), latent),
            "dense.weight": (self.hidden_size, heads * self.value_size),
        }
        if self.q_lora_rank:
            parts["q_a_layernorm.weight"] = (self.q_lora_rank,)
        return {f"attention.{name}": shape for name, shape in parts.items()}


def wrong_sizes(raw: Mapping[str, Any]) -> list[str]:
    """Fields that must be whole numbers for anything else of a configuration to mean something, and are not."""
    return [f"{name} {raw[name]}" for name, least in _sizes(raw).items() if not _is_size(raw[name], least)]


def _sizes(raw: Mapping[str, Any]) -> dict[str, int]:
    """Fields that are sizes or numbers of something, and the least that they can be."""
    attention = ("hidden_size", "num_attention_heads", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim")
    moe = ("moe_num_shared_experts", "moe_inter_size", "moe_top_k")
    groups = ("moe_n_group", "moe_topk_group") if raw["moe_renorm_mode"] == DEVICE_LIMITED else ()
    optional = {_EXPERTS: 0} if raw["q_lora_rank"] is None else {_EXPERTS: 0, "q_lora_rank": 0}
    return dict.fromkeys((*attention, "v_head_dim", *moe, *groups), 1) | optional


def _is_size(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def conditions(raw: Mapping[str, Any]) -> Iterator[tuple[bool, str]]:
    """What must hold for a configuration to be interpreted, and what to say where it does not."""
    scaling = raw["rotary_scaling"]
    complete = isinstance(scaling, dict) and all(name in scaling for name in YARN)
    yield complete, f"rotary_scaling {scaling} without {', '.join(YARN)}"
    yield raw["hidden_act"] == "swiglu", f"hidden_act {raw['hidden_act']} of {raw['architecture']}"
    yield raw["v_head_dim"] == raw["qk_nope_head_dim"], "v_head_dim other than qk_nope_head_dim"
    table = raw.get("moe") or {}
    for name, field in _TABLE.items():
        value = table.get(name, raw[field])
        yield value == raw[field], f"moe.{name} {value} beside {field} {raw[field]}"
    shared = raw["moe_num_shared_experts"] * raw["moe_inter_size"]
    size = table.get("shared_expert_intermediate_size", shared)
    yield size == shared, f"moe.shared_expert_intermediate_size {size} beside shared experts of {shared}"


def of_layer(raw: Mapping[str, Any], layer: int) -> Mapping[str, Any]:
    """The configuration of one layer: the first has no experts."""
    return {**raw, _EXPERTS: 0, "moe": None} if layer == 0 else raw


def experts(raw: Mapping[str, Any]) -> Experts | None:
    """The experts of all layers but the first, or None where a configuration has none."""
    if raw[_EXPERTS] < 1:
        return None
    mode = raw["moe_renorm_mode"]
    limited = mode == DEVICE_LIMITED
    return Experts.placed(
        raw["mapping"],
        num_experts=int(raw[_EXPERTS]),
        top_k=int(raw["moe_top_k"]),
        renormalize=mode == 1,
        hidden_size=int(raw["hidden_size"]),
        ffn_size=int(raw["moe_inter_size"]),
        shared_ffn_size=int(raw["moe_num_shared_experts"]) * int(raw["moe_inter_size"]),
        mode=mode,
        shared_gate=False,
        num_groups=int(raw["moe_n_group"]) if limited else 1,
        top_groups=int(raw["moe_topk_group"]) if limited else 1,
        scaling=float(raw["moe_routed_scaling_factor"]) if limited else 1.0,
    )


def expert_shapes(experts: Experts, *, shared_in_mlp: bool) -> dict[str, tuple[int, ...]]:
    """Name within a layer -> shape of the experts' tensors; 0.15 has routed and shared ones as two modules."""
    shapes = experts.shapes(shared_in_mlp=True)
    if shared_in_mlp:
        return shapes
    hidden, shared = experts.hidden_size, experts.shared_ffn_size // experts.tp_size
    parts = {name: shape for name, shape in shapes.items() if ".shared_expert." not in name}
    return {
        **{name.replace("mlp.", "mlp.moe.", 1): shape for name, shape in parts.items()},
        **{f"mlp.shared_experts.{name}.weight": (shared, hidden) for name in ("fc", "gate")},
        "mlp.shared_experts.proj.weight": (hidden, shared),
    }
