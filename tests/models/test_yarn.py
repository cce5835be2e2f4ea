"""Yarn's numbers out of arguments as each release saved them."""

from __future__ import annotations

import pytest
from recorded_arguments import ABSENT, LLAMA, Checkpoint

from dist_export.errors import Faults
from dist_export.models.config import RopeScaling
from dist_export.models.megatron_arguments import Arguments
from dist_export.models.yarn import latent_claim


def latent(**values: object) -> object:
    return latent_claim(Arguments({"multi_latent_attention": True, **values}, Faults("arguments"))).value


def test_latent_attention_of_0_10_has_the_defaults_of_its_class() -> None:
    """0.10 has no arguments for mscale, beta and the length; `MLATransformerConfig` of core_v0.10.0 has 0.707 for
    both mscales."""
    expected = RopeScaling("yarn", 40.0, original_max_position_embeddings=163840, mscale=0.707, mscale_all_dim=0.707)
    assert (expected.beta_fast, expected.beta_slow) == (32.0, 1.0)
    assert latent(rotary_scaling_factor=40, max_position_embeddings=163840) == expected
    assert latent(max_position_embeddings=163840) == expected


def test_latent_attention_from_0_14_starts_from_a_length_of_its_own() -> None:
    """Real arguments of 0.16: `rope_type` is there and no `original_max_position_embeddings`, so that the class's 4096
    counts, whatever length the model was trained with."""
    saved = Checkpoint(LLAMA).arguments
    assert saved is not None and saved["max_position_embeddings"] == 64
    values = {**saved, "rotary_scaling_factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.5}
    scaling = latent(**values)
    assert scaling == RopeScaling("yarn", 40.0, original_max_position_embeddings=4096, mscale_all_dim=0.5)
    assert latent(**values, original_max_position_embeddings=2048).original_max_position_embeddings == 2048  # type: ignore[attr-defined]


def test_a_transformer_config_before_0_14_has_a_rope_type_and_starts_from_the_models_length() -> None:
    """NeMo 2 saves all fields of the class: core_v0.11.0 to 0.13.0 hand `max_position_embeddings` to yarn."""
    fields = {"activation_func": "torch.nn.functional.silu", "rope_type": "yarn", "rotary_scaling_factor": 40}
    fields |= {"max_position_embeddings": 8192, "mscale": 1.0, "mscale_all_dim": 1.0}
    assert latent(**fields).original_max_position_embeddings == 8192  # type: ignore[attr-defined]
    assert latent(**fields, original_max_position_embeddings=4096).original_max_position_embeddings == 4096  # type: ignore[attr-defined]


YARN = {
    "yarn_rotary_scaling_factor": 16.0,
    "yarn_original_max_position_embeddings": 1024,
    "yarn_beta_fast": 24.0,
    "yarn_beta_slow": 2.0,
    "yarn_mscale": 0.75,
    "yarn_mscale_all_dim": 0.25,
}


@pytest.mark.parametrize(("rounded", "truncate"), [(ABSENT, True), (True, True), (False, False)])
def test_positions_that_are_yarn(rounded: object, truncate: bool) -> None:
    """Fields of Megatron-Bridge's provider, each by its name (megatron/core/models/gpt/gpt_model.py); borders are
    rounded unless `yarn_correction_range_round_to_int` is false."""
    checkpoint = Checkpoint(LLAMA).args(position_embedding_type="yarn", **YARN)
    checkpoint.args(yarn_correction_range_round_to_int=rounded, mscale=ABSENT, mscale_all_dim=ABSENT)
    expected = RopeScaling(
        "yarn",
        16.0,
        original_max_position_embeddings=1024,
        beta_fast=24.0,
        beta_slow=2.0,
        mscale=0.75,
        mscale_all_dim=0.25,
        truncate=truncate,
    )
    assert checkpoint.value("rope_scaling") == expected


def test_positions_that_are_yarn_by_the_arguments_of_megatron_lm() -> None:
    """`YarnRotaryEmbedding` has beta_fast 32, beta_slow 1 and an mscale of 1, of 0 for all dims."""
    checkpoint = Checkpoint(LLAMA).args(position_embedding_type="yarn", yarn_original_max_position_embeddings=32)
    checkpoint.args(rotary_scaling_factor=8.0, mscale=0.5, mscale_all_dim=0.125)
    expected = RopeScaling("yarn", 8.0, original_max_position_embeddings=32, mscale=0.5, mscale_all_dim=0.125)
    assert checkpoint.value("rope_scaling") == expected
    checkpoint.args(mscale=ABSENT, mscale_all_dim=ABSENT)
    assert checkpoint.value("rope_scaling") == RopeScaling("yarn", 8.0, original_max_position_embeddings=32)
