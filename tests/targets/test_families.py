"""Which family a model belongs to, and why it belongs to none."""

from __future__ import annotations

from typing import Any

import pytest
from support.small_models import model_config

from dist_export.errors import ExportError
from dist_export.families.registry import FAMILIES, choose_family

NEMOTRON: dict[str, Any] = {
    "normalization": "LayerNorm", "zero_centered_norm": True, "activation": "squared_relu", "gated": False,
    "rotary_percent": 1.0,
}  # fmt: skip
GPT: dict[str, Any] = {
    "normalization": "LayerNorm", "activation": "gelu", "gated": False, "position_embedding": "learned_absolute"
}  # fmt: skip

STARCODER2 = GPT | {"position_embedding": "rope", "linear_bias": True, "qkv_bias": True}
GEMMA: dict[str, Any] = {"zero_centered_norm": True, "activation": "gelu_tanh", "embedding_scaling": True}


@pytest.mark.parametrize(
    ("fields", "family"),
    [
        ({}, "llama"),
        ({"linear_bias": True, "tied_embeddings": True}, "llama"),
        (NEMOTRON, "nemotron"),
        (GPT, "gpt"),
        (NEMOTRON | {"zero_centered_norm": False}, "gpt"),
        (NEMOTRON | {"activation": "silu", "gated": True}, "gpt"),
        (STARCODER2, "starcoder2"),
        (STARCODER2 | {"activation": "relu"}, "gpt"),
        (GPT | {"num_query_groups": 1}, "starcoder"),
        (GEMMA, "gemma"),
        (GEMMA | {"post_norms": True, "attn_logit_softcapping": 50.0, "query_pre_attn_scalar": 3.0}, "gemma2"),
        (STARCODER2 | {"parallel_attention": True}, "falcon"),
        (STARCODER2 | {"parallel_attention": True, "separate_mlp_norm": False, "num_query_groups": 1}, "falcon"),
    ],
)
def test_the_most_particular_family_that_fits(fields: dict[str, Any], family: str) -> None:
    assert choose_family(model_config(**fields)).name == family


def test_a_named_family_must_fit() -> None:
    assert choose_family(model_config(**NEMOTRON), "gpt").name == "gpt"
    with pytest.raises(ExportError, match=r"not nemotron: .*norms are not zero-centred; the activation is silu"):
        choose_family(model_config(), "nemotron")
    with pytest.raises(ExportError, match=r"--family t5: unknown; known: .*nemotron, .*llama, .*gpt"):
        choose_family(model_config(), "t5")


def test_a_model_of_no_family_is_told_every_reason() -> None:
    config = model_config(activation="gelu", gated=False)
    with pytest.raises(ExportError) as error:
        choose_family(config)
    for family in FAMILIES:
        assert f"not {family.name}: " in str(error.value)
    assert "not llama: the MLP is not a gated SiLU one (gelu)" in str(error.value)
