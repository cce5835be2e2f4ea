"""Limits of single model classes that a config.json cannot get around: each is a reason to refuse, by its message."""

from __future__ import annotations

from typing import Any

import pytest
from support.small_models import model_config

from dist_export.families.registry import FAMILIES
from dist_export.plan.layout import TargetLayout
from dist_export.targets.huggingface.config import model_faults
from dist_export.targets.trtllm.config import engine_faults

ONE = TargetLayout(1, 1, (2,))


@pytest.mark.parametrize(
    "family, target, fields, message",
    [
        ("falcon", "trtllm", {"norm_epsilon": 1e-6}, "its last norm has an epsilon of 1e-5"),
        ("qwen3", "trtllm", {"qk_norm": True, "qkv_bias": True}, "the class has no biases"),
        ("qwen3", "hf", {"qk_norm": True, "qkv_bias": True}, "would need one on the output"),
        ("gemma", "hf", {"activation": "gelu"}, "its gelu is the tanh form"),
    ],
)
def test_what_a_class_computes_otherwise_is_refused(
    family: str, target: str, fields: dict[str, Any], message: str
) -> None:
    (found,) = [each for each in FAMILIES if each.name == family]
    engine: Any = found.architectures[target][0]
    model = model_config(**fields)
    faults = engine_faults(engine, model, ONE) if target == "trtllm" else model_faults(engine, model)
    assert message in str(faults.messages)


def test_experts_that_do_not_divide_by_moe_tp_are_refused() -> None:
    (mixtral,) = [each for each in FAMILIES if each.name == "mixtral"]
    engine: Any = mixtral.architectures["trtllm"][0]
    model = model_config(num_experts=4, moe_top_k=2, moe_ffn_hidden_size=6)
    faults = engine_faults(engine, model, TargetLayout(4, 1, (2,)))
    assert "expert ffn size 6 does not divide by moe tp 4" in str(faults.messages)
    assert "expert ffn" not in str(engine_faults(engine, model, TargetLayout(4, 1, (2,), 2)).messages)
