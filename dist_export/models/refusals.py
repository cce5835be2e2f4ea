"""Training arguments that make a model this program cannot export yet, each with its reason.

One table: supporting a feature means removing its row. A row fires on what the saved arguments say, never
on what a tensor looks like, because most of these change the function and leave every name and shape alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from msgspec import Struct


class Refusal(Struct, frozen=True):
    """`argument` set to a value for which `refuses` is true cannot be exported, because `reason`."""

    argument: str
    refuses: Callable[[object], bool]
    reason: str


def _given(value: object) -> bool:
    return value is not None


def _on(value: object) -> bool:
    """True for a set switch, a pattern or a path; False for None, False, 0 and empty text or lists."""
    return bool(value)


def _is(*words: str) -> Callable[[object], bool]:
    return lambda value: value in words if isinstance(value, str) else False


def _is_not(word: object) -> Callable[[object], bool]:
    return lambda value: value is not None and value != word


def _names(word: str) -> Callable[[object], bool]:
    return lambda value: value == word or (isinstance(value, list | tuple) and word in value)


_HYBRID = "layers of several kinds (Mamba hybrids) have no rule table"
_HETEROGENEOUS = "layers that differ in shape have no rule table"
_RETRO = "Retro models carry a retrieval encoder that no target has"
_NO_TARGET = "no target computes it"

ENCODED_BLOCKS = "heterogeneous_layers_config_encoded_json"
_OF_BLOCKS = ("heterogeneous_layers_config_path", "heterogeneous_block_specs")
"""What an exporter need not look at where the blocks themselves are given."""

#: Every refusal. Later rows do not depend on earlier ones; all that fire are reported together.
REFUSALS: tuple[Refusal, ...] = (
    Refusal(
        "apply_residual_connection_post_layernorm",
        _on,
        "the residual is taken after the norm, targets take it before",
    ),
    Refusal("attention_output_gate", _on, "gated attention stores gates among the query rows; " + _NO_TARGET),
    Refusal("softmax_type", _is("off-by-one"), "the softmax has one added to its sum; " + _NO_TARGET),
    Refusal("softmax_scale", _given, "scores are scaled by a number of their own, not by 1/sqrt(head_size)"),
    Refusal("linear_attention_freq", _given, "linear-attention layers have no rule table"),
    Refusal("experimental_attention_variant", _given, "this attention has no rule table"),
    Refusal("no_rope_freq", _on, "some layers skip rotary embeddings; " + _NO_TARGET),
    Refusal("qk_l2_norm", _on, "queries and keys are divided by their length; " + _NO_TARGET),
    Refusal("interleaved_attn_pattern", _given, "layers with a window rotate by another base; " + _NO_TARGET),
    Refusal("sliding_window_rope_base", _given, "layers with a window rotate by another base; " + _NO_TARGET),
    Refusal("position_embedding_type", _is("mrope", "relative"), "these positions have no target"),
    Refusal("rope_type", _is("yarn"), "yarn rotary embeddings have no target"),
    Refusal("mrope_section", _given, "multimodal rotary embeddings have no target"),
    Refusal("heterogeneous_layers_config_path", _on, _HETEROGENEOUS),
    Refusal("heterogeneous_block_specs", _on, _HETEROGENEOUS),
    Refusal("hybrid_layer_pattern", _on, _HYBRID),
    Refusal("hybrid_override_pattern", _on, _HYBRID),
    Refusal("is_hybrid_model", _on, _HYBRID),
    Refusal("hybrid_attention_ratio", _on, _HYBRID),
    Refusal("hybrid_mlp_ratio", _on, _HYBRID),
    Refusal("retro_add_retriever", _on, _RETRO),
    Refusal(
        "moe_shared_expert_glu_interleave_size",
        _given,
        "gate and up rows of shared experts alternate in blocks instead of lying in halves",
    ),
    Refusal("moe_latent_size", _given, "experts work in a projected space; " + _NO_TARGET),
    Refusal("moe_apply_probs_on_input", _on, "router weights scale the experts' input; " + _NO_TARGET),
    Refusal("moe_router_load_balancing_type", _names("sinkhorn"), "sinkhorn routing; " + _NO_TARGET),
    Refusal("moe_router_score_function", _is("sqrtsoftplus"), "router scores of this form; " + _NO_TARGET),
    Refusal(
        "moe_router_topk_limited_devices",
        _given,
        "routing depends on how experts were spread over devices in training",
    ),
    Refusal("transformer_block_type", _is("post_ln", "normformer"), "only pre_ln blocks have a rule table"),
    Refusal("headscale", _on, "every head is multiplied by a weight; " + _NO_TARGET),
    Refusal("use_mup", _on, "muP multiplies embeddings, attention and logits; " + _NO_TARGET),
    Refusal("enable_mhc_connections", _on, "hyper-connections replace the residual; " + _NO_TARGET),
)


def refused_arguments(arguments: Mapping[str, object]) -> Iterator[str]:
    """One message for each row of `REFUSALS` that `arguments` (a saved Namespace as a mapping) triggers."""
    blocks = bool(arguments.get(ENCODED_BLOCKS))
    latent = bool(arguments.get("multi_latent_attention"))  # where rope_type is a field of the model
    for refusal in REFUSALS:
        value = arguments.get(refusal.argument)
        expressed = (latent and refusal.argument == "rope_type") or (blocks and refusal.argument in _OF_BLOCKS)
        if refusal.refuses(value) and not expressed:
            yield f"{refusal.argument} = {_shown(value)} cannot be exported: {refusal.reason}"


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
