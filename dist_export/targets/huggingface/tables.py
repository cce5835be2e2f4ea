"""What the tables of transformers' models are made of; vLLM, SGLang and TensorRT-LLM read the same names.

Names are parameter paths of the modules (transformers/models/llama/modeling_llama.py, and its
kin). Tensors are whole: these consumers divide them when they load.
"""

from __future__ import annotations

from dist_export.models.config import ModelConfig
from dist_export.models.megatron import any_bias, untied
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
