"""Names of transformers' models: one table per architecture, read by vLLM, SGLang and TensorRT-LLM as well.

Names are parameter paths of the modules (transformers/models/llama/modeling_llama.py, gpt2/modeling_gpt2.py,
nemotron/modeling_nemotron.py). Tensors are whole: these consumers divide them when they load.
"""

from __future__ import annotations

from dist_export.models.config import ModelConfig
from dist_export.models.megatron import any_bias, linear_bias, untied
from dist_export.models.rules import Condition, Input, Scope, TargetRule, always
from dist_export.models.value_ops import ValueOp, ValueOps, no_value_ops

LAYER = "model.layers.{layer}."
LOGICAL = "layers.{layer}."


def minus_one(config: ModelConfig) -> tuple[ValueOp, ...]:
    """The consumer adds one to the stored norm weight."""
    return (ValueOp.SUBTRACT_ONE,)


def tensor(target: str, logical: str, *, scope: Scope = Scope.LAYER, when: Condition = always) -> TargetRule:
    """One logical tensor under another name."""
    return TargetRule(target, (Input(logical),), scope, when=when)


def linear(target: str, logical: str, *, bias: Condition) -> tuple[TargetRule, ...]:
    """Weight and bias of a linear layer."""
    weight = Input(logical + ".weight")
    return (
        TargetRule(target + ".weight", (weight,)),
        TargetRule(target + ".bias", (Input(logical + ".bias", zeros_for=weight.logical),), when=bias),
    )


def norm(
    target: str, logical: str, *, scope: Scope = Scope.LAYER, values: ValueOps = no_value_ops, bias: bool = False
) -> tuple[TargetRule, ...]:
    """A norm's weight, and its bias where the module has one."""
    weight = Input(logical + ".weight")
    rules = (TargetRule(target + ".weight", (weight,), scope, values=values),)
    if not bias:
        return rules
    return (*rules, TargetRule(target + ".bias", (Input(logical + ".bias", zeros_for=weight.logical),), scope))


ENDS = (
    tensor("model.embed_tokens.weight", "embedding.weight", scope=Scope.FIRST),
    tensor("lm_head.weight", "head.weight", scope=Scope.LAST, when=untied),
)

ATTENTION = (
    *linear(LAYER + "self_attn.q_proj", LOGICAL + "attention.query", bias=any_bias),
    *linear(LAYER + "self_attn.k_proj", LOGICAL + "attention.key", bias=any_bias),
    *linear(LAYER + "self_attn.v_proj", LOGICAL + "attention.value", bias=any_bias),
    *linear(LAYER + "self_attn.o_proj", LOGICAL + "attention.output", bias=any_bias),
)

LLAMA = (
    *ENDS,
    *norm(LAYER + "input_layernorm", LOGICAL + "attention.norm"),
    *ATTENTION,
    *norm(LAYER + "post_attention_layernorm", LOGICAL + "mlp.norm"),
    *linear(LAYER + "mlp.gate_proj", LOGICAL + "mlp.gate", bias=linear_bias),
    *linear(LAYER + "mlp.up_proj", LOGICAL + "mlp.up", bias=linear_bias),
    *linear(LAYER + "mlp.down_proj", LOGICAL + "mlp.down", bias=linear_bias),
    *norm("model.norm", "final_norm", scope=Scope.LAST),
)

NEMOTRON = (
    *ENDS,
    *norm(LAYER + "input_layernorm", LOGICAL + "attention.norm", values=minus_one, bias=True),
    *ATTENTION,
    *norm(LAYER + "post_attention_layernorm", LOGICAL + "mlp.norm", values=minus_one, bias=True),
    *linear(LAYER + "mlp.up_proj", LOGICAL + "mlp.up", bias=linear_bias),
    *linear(LAYER + "mlp.down_proj", LOGICAL + "mlp.down", bias=linear_bias),
    *norm("model.norm", "final_norm", scope=Scope.LAST, values=minus_one, bias=True),
)

MIXTRAL = (
    *ENDS,
    *norm(LAYER + "input_layernorm", LOGICAL + "attention.norm"),
    *ATTENTION,
    *norm(LAYER + "post_attention_layernorm", LOGICAL + "mlp.norm"),
    tensor(LAYER + "block_sparse_moe.gate.weight", LOGICAL + "router.weight"),
    tensor(LAYER + "block_sparse_moe.experts.{expert}.w1.weight", LOGICAL + "experts.{expert}.gate.weight"),
    tensor(LAYER + "block_sparse_moe.experts.{expert}.w2.weight", LOGICAL + "experts.{expert}.down.weight"),
    tensor(LAYER + "block_sparse_moe.experts.{expert}.w3.weight", LOGICAL + "experts.{expert}.up.weight"),
    *norm("model.norm", "final_norm", scope=Scope.LAST),
)

GPT2_LAYER = "transformer.h.{layer}."


def conv1d(target: str, *logical: str) -> tuple[TargetRule, ...]:
    """transformers' Conv1D: the weight is stored ``[in, out]``."""
    weights = tuple(Input(LOGICAL + name + ".weight") for name in logical)
    biases = tuple(Input(LOGICAL + name + ".bias", zeros_for=LOGICAL + name + ".weight") for name in logical)
    return (
        TargetRule(GPT2_LAYER + target + ".weight", weights, transposed=True),
        TargetRule(GPT2_LAYER + target + ".bias", biases),
    )


GPT2 = (
    tensor("transformer.wte.weight", "embedding.weight", scope=Scope.FIRST),
    tensor("transformer.wpe.weight", "position_embedding.weight", scope=Scope.FIRST),
    *norm(GPT2_LAYER + "ln_1", LOGICAL + "attention.norm", bias=True),
    *conv1d("attn.c_attn", "attention.query", "attention.key", "attention.value"),
    *conv1d("attn.c_proj", "attention.output"),
    *norm(GPT2_LAYER + "ln_2", LOGICAL + "mlp.norm", bias=True),
    *conv1d("mlp.c_fc", "mlp.up"),
    *conv1d("mlp.c_proj", "mlp.down"),
    *norm("transformer.ln_f", "final_norm", scope=Scope.LAST, bias=True),
    tensor("lm_head.weight", "head.weight", scope=Scope.LAST, when=untied),
)

TABLES = {
    "LlamaForCausalLM": LLAMA,
    "MixtralForCausalLM": MIXTRAL,
    "NemotronForCausalLM": NEMOTRON,
    "GPT2LMHeadModel": GPT2,
}
"""Architecture in config.json -> its table."""
