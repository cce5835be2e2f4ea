"""Yarn rotary scaling from saved arguments: of multi-latent attention, and of position_embedding_type yarn."""

from __future__ import annotations

from dist_export.models.config import RopeScaling
from dist_export.models.megatron_arguments import Arguments
from dist_export.models.provenance import Claim, from_arguments


def latent_claim(arguments: Arguments) -> Claim:
    """Multi-latent attention makes its own rotary table: yarn unless `rope_type` says rope (`rope_type` is an argument
    since 0.14, None meaning yarn). Yarn with factor 1, the argument's default, is no scaling.

    The length that yarn starts from was `max_position_embeddings` before 0.14, in which `rope_type` was no argument
    but, from 0.11 on, a field of the `TransformerConfig` that NeMo saves. Where an argument is missing the class's own
    default counts (transformer_config.py, `MLATransformerConfig`): 0.10 had no mscale arguments.
    """
    factor = arguments.number("rotary_scaling_factor")
    factor = 40.0 if factor is None else factor
    names = ["rotary_scaling_factor"]
    if arguments.word("rope_type") == "rope" or factor == 1.0:
        return _unscaled(arguments, factor)
    numbers = {"mscale": 0.707, "mscale_all_dim": 0.707, "beta_fast": 32.0, "beta_slow": 1.0}
    for name in numbers:
        given = arguments.number(name)
        if given is not None:
            numbers[name] = given
            names.append(name)
    fields = arguments.has("activation_func")  # of a `TransformerConfig`
    before_0_14 = not arguments.has("original_max_position_embeddings") and (fields or not arguments.has("rope_type"))
    length = "max_position_embeddings" if before_0_14 else "original_max_position_embeddings"
    original = arguments.integer(length)
    scaling = RopeScaling("yarn", factor, original_max_position_embeddings=original or 4096, **numbers)  # type: ignore[arg-type]
    return Claim(scaling, from_arguments(*names, length))


def _unscaled(arguments: Arguments, factor: float) -> Claim:
    """Rotary positions as they are. Scores are scaled by mscale_all_dim all the same, which no target computes."""
    if factor > 1 and arguments.number("mscale_all_dim"):
        arguments.faults.add(
            f"rope_scaling: rope_type is rope, but rotary_scaling_factor {factor:g} and mscale_all_dim "
            f"{arguments.number('mscale_all_dim'):g} still scale Megatron's scores; no target computes that"
        )
    name = "rope_type" if arguments.word("rope_type") == "rope" else "rotary_scaling_factor"
    return Claim(None, from_arguments(name))


_NUMBERS = {
    "factor": ("yarn_rotary_scaling_factor", "rotary_scaling_factor"),
    "original_max_position_embeddings": ("yarn_original_max_position_embeddings",),
    "beta_fast": ("yarn_beta_fast",),
    "beta_slow": ("yarn_beta_slow",),
    "mscale": ("yarn_mscale", "mscale"),
    "mscale_all_dim": ("yarn_mscale_all_dim", "mscale_all_dim"),
}
"""Fields of Megatron-Bridge's GPTModelProvider, then Megatron-LM's arguments (training/argument_utils.py,
`_apply_yarn_config_from_args`, 2026-06)."""
_BY_DEFAULT = {"original_max_position_embeddings": 4096, "beta_fast": 32.0, "beta_slow": 1.0}
_ROUNDED = "yarn_correction_range_round_to_int"
_GPT_OSS = RopeScaling("yarn", 32.0, original_max_position_embeddings=131072, truncate=False)
"""What `enable_gpt_oss` stands for (megatron/post_training/model_builder.py)."""


def position_claim(arguments: Arguments) -> Claim:
    """The scaling of a model with position_embedding_type yarn. No mscale is an mscale of 1, of 0 for all dims."""
    if arguments.switch("enable_gpt_oss"):
        return Claim(_GPT_OSS, from_arguments("enable_gpt_oss"))
    if not any(arguments.has(name) for name in _NUMBERS["original_max_position_embeddings"]):
        arguments.faults.add(
            "rope_scaling: position_embedding_type is yarn, but the checkpoint args hold none of its numbers; give "
            "--set rope_scaling=yarn:FACTOR:ORIGINAL_LENGTH, or a file with all of them"
        )
        return Claim(None, from_arguments("position_embedding_type"))
    names, numbers = [], dict(_BY_DEFAULT)
    for field, candidates in _NUMBERS.items():
        found = next((name for name in candidates if arguments.number(name) is not None), None)
        if found is not None:
            numbers[field] = arguments.number(found)  # type: ignore[assignment]
            names.append(found)
    rounded = arguments.boolean(_ROUNDED)
    numbers["original_max_position_embeddings"] = int(numbers["original_max_position_embeddings"])
    factor = numbers.pop("factor", 1.0)
    truncate = rounded is None or rounded
    return Claim(RopeScaling("yarn", factor, truncate=truncate, **numbers), from_arguments(*names))  # type: ignore[arg-type]
