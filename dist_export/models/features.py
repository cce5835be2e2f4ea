"""What only some families can express: a family that does not name one of these is never taken for a model with it."""

from __future__ import annotations

from collections.abc import Callable

from msgspec import Struct

from dist_export.errors import ExportError
from dist_export.models.config import ModelConfig


class Feature(Struct, frozen=True):
    """Something uncommon about a model."""

    found: Callable[[ModelConfig], bool]
    description: str
    """Of the model, after "it"."""


LATENT_ATTENTION = Feature(lambda m: m.kv_lora_rank > 0, "has multi-latent attention")
MTP = Feature(lambda m: m.num_mtp_layers > 0, "has layers that predict further tokens")
EMBEDDING_SCALING = Feature(lambda m: m.embedding_scaling, "multiplies word embeddings by sqrt(hidden_size)")
POST_NORMS = Feature(lambda m: m.post_norms, "norms what attention and MLP return")
QUERY_SCALAR = Feature(
    lambda m: m.query_pre_attn_scalar not in (None, m.head_size), "scales scores by a number that is not the head size"
)
CAPPED_SCORES = Feature(lambda m: m.attn_logit_softcapping is not None, "caps attention scores")
CAPPED_LOGITS = Feature(lambda m: m.final_logit_softcapping is not None, "caps logits")
SOME_WINDOWS = Feature(
    lambda m: m.window_layers is not None and not all(m.window_layers), "has an attention window in some layers only"
)
PARALLEL_ATTENTION = Feature(lambda m: m.parallel_attention, "computes attention and MLP side by side")
SINKS = Feature(lambda m: m.attention_sinks, "has attention sinks")
BOUNDED_GLU = Feature(
    lambda m: m.glu_offset != 0 or m.activation_clamp is not None, "clamps its gated activation or adds an offset to it"
)
YARN = Feature(lambda m: m.rope_scaling is not None and m.rope_scaling.kind == "yarn", "has yarn rotary scaling")
BLOCKS = Feature(lambda m: m.blocks is not None, "has layers that differ from one another in kind or size")

FEATURES = (
    *(LATENT_ATTENTION, MTP, BLOCKS, SINKS, BOUNDED_GLU, YARN),
    *(EMBEDDING_SCALING, POST_NORMS, QUERY_SCALAR, CAPPED_SCORES, CAPPED_LOGITS),
    *(SOME_WINDOWS, PARALLEL_ATTENTION),
)


NOT_QUANTISED = frozenset({LATENT_ATTENTION, MTP, BLOCKS, SINKS})
"""Features of models whose quantised exports nothing has borne witness to."""


def refuse_quantised(config: ModelConfig) -> None:
    """Raise `ExportError` for a model that cannot be exported quantised."""
    found = [f"it {each.description}" for each in FEATURES if each in NOT_QUANTISED and each.found(config)]
    if found:
        raise ExportError(f"this model cannot be exported quantised: {', '.join(found)}; export it in bfloat16")


def unsupported(config: ModelConfig, supported: frozenset[Feature]) -> list[str]:
    """Features of a model that are not among those `supported`."""
    return [f"it {each.description}" for each in FEATURES if each not in supported and each.found(config)]
