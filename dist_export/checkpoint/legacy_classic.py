"""Names of the classic model (``megatron/model``, later ``megatron/legacy/model``, gone in 0.18) as Megatron-Core's.

Its state is nested dictionaries; the names here are their keys joined with dots, without ``module.`` and ``model.``.
Three generations differ: ``transformer`` and ``attention`` (until 2.0), ``encoder`` and ``self_attention`` (from
2.5), ``norm`` for ``layernorm`` (from 0.4). Experts (``SwitchMLP``) are refused: their router takes the sigmoid of
the one largest score, which no target computes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from msgspec import Struct

_STACK = r"(?:.*\.)?(?:transformer|encoder)\."
_LAYER = _STACK + r"layers\.(\d+)\."
_ATTENTION = _LAYER + r"(?:self_)?attention\."
_KIND = r"(weight|bias)"


class NameRule(Struct, frozen=True):
    """A classic name, as a pattern for the whole of it, and the name that Megatron-Core has for it."""

    classic: str
    core: str
    """``\\1``, ``\\2``: groups of the pattern."""


RULES: tuple[NameRule, ...] = (
    NameRule(r"(?:.*\.)?word_embeddings\.weight", "embedding.word_embeddings.weight"),
    NameRule(r"(?:.*\.)?position_embeddings\.weight", "embedding.position_embeddings.weight"),
    NameRule(_LAYER + rf"input_(?:layer)?norm\.{_KIND}", r"decoder.layers.\1.input_layernorm.\2"),
    NameRule(_ATTENTION + rf"query_key_value\.{_KIND}", r"decoder.layers.\1.self_attention.linear_qkv.\2"),
    NameRule(_ATTENTION + rf"dense\.{_KIND}", r"decoder.layers.\1.self_attention.linear_proj.\2"),
    NameRule(_LAYER + rf"post_attention_(?:layer)?norm\.{_KIND}", r"decoder.layers.\1.pre_mlp_layernorm.\2"),
    NameRule(_LAYER + rf"mlp\.dense_h_to_4h\.{_KIND}", r"decoder.layers.\1.mlp.linear_fc1.\2"),
    # NeMo 1 keeps the up half of its slower GLUs apart.
    NameRule(_LAYER + rf"mlp\.dense_h_to_4h_2\.{_KIND}", r"decoder.layers.\1.mlp.linear_fc1.\2_v"),
    NameRule(_LAYER + rf"mlp\.dense_4h_to_h\.{_KIND}", r"decoder.layers.\1.mlp.linear_fc2.\2"),
    NameRule(_STACK + rf"final_(?:layer)?norm\.{_KIND}", r"decoder.final_layernorm.\1"),
    NameRule(r"(?:.*\.)?output_layer\.weight", "output_layer.weight"),
    # The last pipeline stage's copy of tied embeddings.
    NameRule(r"(?:.*\.)?word_embeddings_for_head\.weight", "output_layer.weight"),
)
_PATTERNS = tuple((re.compile(rule.classic), rule.core) for rule in RULES)
_IGNORED = re.compile(r"(^|\.)(attention_mask|masked_bias|causal_mask|ltor_mask)$")
_OF_CLASSIC_ONLY = re.compile(r"(^|\.)(language_model|word_embeddings_for_head|query_key_value|dense_h_to_4h)\.")


def is_classic(names: Iterable[str]) -> bool:
    """Whether the tensors of a model chunk have names that only the classic model gives."""
    return any(_OF_CLASSIC_ONLY.search(name) for name in names)


def is_mask(name: str) -> bool:
    """Whether it is the buffer of an attention mask."""
    return _IGNORED.search(name) is not None


def core_name(name: str) -> str | None:
    """Megatron-Core's name of a classic tensor, or None when a GPT model has no such tensor."""
    for pattern, core in _PATTERNS:
        match = pattern.fullmatch(name)
        if match:
            return match.expand(core)
    return None


def core_names(names: Iterable[str]) -> dict[str, str | None]:
    """`core_name` of each of the tensors of a model chunk. Where gate and up lie apart, the gate is ``weight_w``."""
    found = {name: core_name(name) for name in names}
    ups = {core for core in found.values() if core is not None and core.endswith("_v")}
    gates = {core[:-2] for core in ups}
    return {name: f"{core}_w" if core in gates else core for name, core in found.items()}
