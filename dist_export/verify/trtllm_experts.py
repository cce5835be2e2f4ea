"""The experts of a TensorRT-LLM checkpoint: what config.json says of them, and their tensors' shapes.

Written from tensorrt_llm/layers/moe.py, models/{llama,qwen}/model.py and mapping.py alone, without the exporter's
rules.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from msgspec import Struct

ROUTER = "mlp.router.weight"
"""Always float32."""
SHARED_EXPERT_IN_MLP = "mlp.shared_expert.fc.weight"
"""Where 0.16 and later have it; before, it was beside the MLP. No field says which."""

DEVICE_LIMITED = 3
"""The normalization mode that picks among the experts of the best groups."""


class Experts(Struct, frozen=True):
    """The experts of every layer."""

    num_experts: int
    top_k: int
    renormalize: bool
    """Weights of the chosen experts are made to sum to one."""
    hidden_size: int
    ffn_size: int
    """Of one expert."""
    shared_ffn_size: int
    """Of the expert that every token goes to; 0 without one."""
    tp_size: int
    moe_tp_size: int
    moe_ep_size: int
    mode: object
    shared_gate: bool = True
    """What the shared expert adds is weighted."""
    num_groups: int = 1
    top_groups: int = 1
    """Of so many groups of neighbouring experts a token goes to those of so many groups with the best expert."""
    scaling: float = 1.0
    """Of the weights."""

    @staticmethod
    def of(raw: Mapping[str, Any], *, is_qwen: bool) -> Experts | None:
        """The experts that a config.json asks for; None for a dense model."""
        moe, mapping = raw.get("moe") or {}, raw["mapping"]
        if moe.get("num_experts", 0) <= 1:
            return None
        return Experts.placed(
            mapping,
            num_experts=int(moe["num_experts"]),
            top_k=int(moe["top_k"]),
            renormalize=moe.get("normalization_mode") == 1,
            hidden_size=int(raw["hidden_size"]),
            ffn_size=int(raw["moe_intermediate_size"] if is_qwen else raw["intermediate_size"]),
            shared_ffn_size=_shared_size(raw),
            mode=moe.get("normalization_mode"),
        )

    @staticmethod
    def placed(mapping: Mapping[str, Any], **fields: Any) -> Experts:
        """Experts of these fields, on the ranks of a mapping."""
        tp, ep = int(mapping.get("tp_size", 1)), int(mapping.get("moe_ep_size", -1))
        moe_tp = int(mapping.get("moe_tp_size", -1))
        both = moe_tp == -1  # the rule until 1.0; from then on only if both are
        return Experts(**fields, tp_size=tp, moe_tp_size=tp if both else moe_tp, moe_ep_size=1 if both else ep)

    @property
    def num_local(self) -> int:
        """Experts of a rank."""
        return self.num_experts // self.moe_ep_size

    def first(self, tp_rank: int) -> int:
        """The first expert of a rank: ep is the faster axis, and its ranks have whole runs of experts."""
        return tp_rank % self.moe_ep_size * self.num_local

    def conditions(self) -> Iterator[tuple[bool, str]]:
        """What must hold for the experts to be interpreted, and what to say where it does not."""
        limited = not self.shared_gate  # of DeepSeek-V2's class alone
        yield self.mode in ((0, 1, DEVICE_LIMITED) if limited else (0, 1)), f"moe.normalization_mode {self.mode}"
        yield self.num_experts % self.num_groups == 0, "num_experts that do not divide by their groups"
        yield self.moe_tp_size * self.moe_ep_size == self.tp_size, "moe_tp_size x moe_ep_size that is not tp_size"
        yield self.num_experts % self.moe_ep_size == 0, "num_experts that do not divide by moe_ep_size"
        yield self.ffn_size % self.moe_tp_size == 0, "an expert's size that does not divide by moe_tp_size"

    def shapes(self, *, shared_in_mlp: bool) -> dict[str, tuple[int, ...]]:
        """Name within a layer -> shape of every tensor of a rank."""
        hidden, ffn = self.hidden_size, self.ffn_size // self.moe_tp_size
        shapes: dict[str, tuple[int, ...]] = {
            ROUTER: (self.num_experts, hidden),
            "mlp.fc.weight": (self.num_local, 2 * ffn, hidden),
            "mlp.proj.weight": (self.num_local, hidden, ffn),
        }
        if self.shared_ffn_size:
            before, shared = "mlp." if shared_in_mlp else "", self.shared_ffn_size // self.tp_size
            shapes[before + "shared_expert.fc.weight"] = (2 * shared, hidden)
            shapes[before + "shared_expert.proj.weight"] = (hidden, shared)
            if self.shared_gate:
                shapes[before + "shared_expert_gate.weight"] = (1, hidden)
        return shapes


def _shared_size(raw: Mapping[str, Any]) -> int:
    has_one = raw.get("qwen_type") == "qwen2_moe"
    return int(raw["moe_shared_expert_intermediate_size"]) if has_one else 0
