"""Qwen2-MoE-style models: Qwen2 with gated experts and one shared expert that a gate of its own weighs."""

from __future__ import annotations

from collections.abc import Callable

from dist_export.families import mixtral, qwen2, qwen3_moe
from dist_export.models.config import ModelConfig
from dist_export.models.megatron import MOE_GPT, SHARED_EXPERT, SHARED_EXPERT_GATE, qkv_bias
from dist_export.models.rules import Family, Input, TargetRule
from dist_export.models.shard_ops import COLUMN, ROW
from dist_export.plan.layout import TargetLayout
from dist_export.targets.huggingface import tables as hf_tables
from dist_export.targets.huggingface.architecture import HuggingFaceModel, Limit
from dist_export.targets.huggingface.tables import LAYER as HF_LAYER
from dist_export.targets.huggingface.tables import tensor
from dist_export.targets.trtllm import config as trtllm
from dist_export.targets.trtllm.architecture import EngineModel, ReleaseLimit
from dist_export.targets.trtllm.releases import ALL, Span
from dist_export.targets.trtllm.tables import LAYER, LOGICAL, EmbeddingSharding, decoder_layer, ends

SHARED = LOGICAL + "shared_expert."


def unmet(config: ModelConfig) -> list[str]:
    """Why a model is not Qwen2-MoE-style."""
    shared = config.moe_shared_expert_ffn_hidden_size
    wanted = (
        (config.qkv_bias, "query, key and value have no bias"),
        (not config.linear_bias, "linear layers other than query, key and value have biases"),
        (not config.qk_norm, "it has q/k norm"),
        (shared, "it has no shared expert"),
        (not shared or config.moe_shared_expert_gate, "its shared experts have no gate (moe_shared_expert_gate)"),
    )
    return mixtral.unmet_base(config) + [reason for holds, reason in wanted if not holds]


def engine_rules_in(shared: str) -> Callable[[EmbeddingSharding], tuple[TargetRule, ...]]:
    """QWenForCausalLM with ``qwen_type`` qwen2_moe, its shared expert's tensors beginning with `shared`.

    Shared experts are a fused MLP whose linear half comes first, as in the experts, and are divided by the whole tp
    whatever the experts are divided by (tensorrt_llm/models/qwen/model.py; layers/moe.py, ``SharedMoE``).
    """

    def rules(embedding: EmbeddingSharding) -> tuple[TargetRule, ...]:
        up, gate = Input(SHARED + "up.weight", COLUMN), Input(SHARED + "gate.weight", COLUMN)
        return (
            *ends(embedding),
            *decoder_layer(),
            *mixtral.ENGINE_OUTPUT,
            *mixtral.ENGINE_EXPERTS,
            TargetRule(shared + "shared_expert.fc.weight", (up, gate)),
            TargetRule(shared + "shared_expert.proj.weight", (Input(SHARED + "down.weight", ROW),)),
            TargetRule(shared + "shared_expert_gate.weight", (Input(LOGICAL + "shared_expert_gate.weight"),)),
        )

    return rules


def engine_fields(model: ModelConfig) -> dict[str, object]:
    """QWenConfig with experts and a shared one."""
    return {
        **qwen2.engine_fields(model),
        **qwen3_moe.expert_fields(model),
        "qwen_type": "qwen2_moe",
        "moe_shared_expert_intermediate_size": model.moe_shared_expert_ffn_hidden_size,
    }


def shared_divides(model: ModelConfig, layout: TargetLayout) -> bool:
    """The shared expert has whole columns on every tp rank."""
    return model.moe_shared_expert_ffn_hidden_size % layout.tp_size == 0


ENGINE_LIMITS: tuple[Limit, ...] = (
    *qwen2.BASE_LIMITS,
    trtllm.NO_QK_NORM,
    (lambda m: m.num_experts > 0, "the class has experts"),
    (lambda m: m.moe_shared_expert_gate, "the class weighs its shared expert by a gate"),
)


def engine(shared: str, releases: Span) -> EngineModel:
    """The class of some releases."""
    return EngineModel(
        name="Qwen2MoeForCausalLM",
        rules=engine_rules_in(shared),
        fields=engine_fields,
        limits=ENGINE_LIMITS,
        keys=qwen2.KEYS,
        releases=releases,
        release_limits=(ReleaseLimit(ALL, shared_divides, "the shared expert does not divide by tp"),),
    )


ENGINES = (engine(LAYER, Span("0.12", "0.15")), engine(LAYER + "mlp.", Span("0.16")))
"""0.16 moved the shared expert into the MLP."""

TABLE = (
    *hf_tables.ENDS,
    *qwen2.NORMS,
    *qwen2.attention(qkv_bias),
    *qwen3_moe.HF_EXPERTS,
    tensor(HF_LAYER + "mlp.shared_expert.gate_proj.weight", SHARED + "gate.weight"),
    tensor(HF_LAYER + "mlp.shared_expert.up_proj.weight", SHARED + "up.weight"),
    tensor(HF_LAYER + "mlp.shared_expert.down_proj.weight", SHARED + "down.weight"),
    tensor(HF_LAYER + "mlp.shared_expert_gate.weight", LOGICAL + "shared_expert_gate.weight"),
)


def hf_fields(model: ModelConfig) -> dict[str, object]:
    """Qwen2MoeConfig (transformers/models/qwen2_moe/configuration_qwen2_moe.py)."""
    return {
        **qwen2.hf_fields(model),
        **qwen3_moe.hf_expert_fields(model),
        "model_type": "qwen2_moe",
        "qkv_bias": model.qkv_bias,
        "shared_expert_intermediate_size": model.moe_shared_expert_ffn_hidden_size,
    }


HF_LIMITS: tuple[Limit, ...] = (
    *qwen2.HF_BASE_LIMITS,
    (lambda m: not m.qk_norm, "it has no q/k norm"),
    (lambda m: m.num_experts > 0, "it has experts"),
    (lambda m: m.moe_shared_expert_gate, "it weighs its shared expert by a gate"),
    (lambda m: m.head_size * m.num_attention_heads == m.hidden_size, "its head size is hidden_size / heads"),
)

QWEN2_MOE = Family(
    name="qwen2-moe",
    description="the Llama base with biases on query, key and value, gated experts and a gated shared one: Qwen2-MoE",
    unmet=unmet,
    source_rules=(*MOE_GPT, *SHARED_EXPERT, SHARED_EXPERT_GATE),
    architectures={
        "trtllm": ENGINES,
        "hf": (HuggingFaceModel(name="Qwen2MoeForCausalLM", rules=TABLE, fields=hf_fields, limits=HF_LIMITS),),
    },
    witnesses={"trtllm": "TensorRT-LLM 0.14's converter", "hf": "transformers"},
)
