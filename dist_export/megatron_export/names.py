"""A ``trtllm_conversion_dict``: a model's own tensor names, by the TensorRT-LLM names that they stand for.

Its values are members of Megatron-Core's ``TRTLLMLayers`` (megatron/core/export/trtllm/trtllm_layers.py) or their
strings. They lead to the names that rules know; from there everything is done by rules.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from dist_export.errors import Faults

_LAYERS = "decoder.layers."
STANDARD: Mapping[str, tuple[str, ...]] = {
    "transformer.vocab_embedding.weight": ("embedding.word_embeddings.weight",),
    "transformer.position_embedding.weight": ("embedding.position_embeddings.weight",),
    "lm_head.weight": ("output_layer.weight",),
    "transformer.ln_f.weight": ("decoder.final_layernorm.weight",),
    "transformer.ln_f.bias": ("decoder.final_layernorm.bias",),
    **{
        f"transformer.layers.{theirs}": tuple(_LAYERS + name for name in ours)
        for theirs, ours in {
            "input_layernorm.weight": ("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight"),
            "input_layernorm.bias": ("self_attention.linear_qkv.layer_norm_bias", "input_layernorm.bias"),
            "attention.qkv.weight": ("self_attention.linear_qkv.weight",),
            "attention.qkv.bias": ("self_attention.linear_qkv.bias",),
            "attention.dense.weight": ("self_attention.linear_proj.weight",),
            "attention.dense.bias": ("self_attention.linear_proj.bias",),
            "post_layernorm.weight": ("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight"),
            "post_layernorm.bias": ("mlp.linear_fc1.layer_norm_bias", "pre_mlp_layernorm.bias"),
            "mlp.fc.weight": ("mlp.linear_fc1.weight",),
            "mlp.fc.bias": ("mlp.linear_fc1.bias",),
            "mlp.proj.weight": ("mlp.linear_fc2.weight",),
            "mlp.proj.bias": ("mlp.linear_fc2.bias",),
            "mlp.router.weight": ("mlp.router.weight",),
            "mlp.fc.weight.expert": ("mlp.experts.experts.linear_fc1.weight",),
            "mlp.proj.weight.expert": ("mlp.experts.experts.linear_fc2.weight",),
            "attention.weight": ("self_attention.weight",),
            "ffn.fc.weight": ("mlp.linear_fc1.weight",),
            "ffn.proj.weight": ("mlp.linear_fc2.weight",),
            "ffn.weight": ("mlp.weight",),
        }.items()
    },
}
"""TensorRT-LLM name without layer number -> the names of Megatron-Core's own models, the first of them used."""
_NUMBER = re.compile(r"(?<=layers\.)(\d+)\.")


def renamed(state: Mapping[str, Any], conversion: Mapping[str, object]) -> dict[str, Any]:
    """`state` under Megatron-Core's names; names that the dictionary does not list stay.

    Raises `ExportError` for values that are no layer of TensorRT-LLM's and for two tensors of one name.
    """
    faults, names = Faults("trtllm_conversion_dict"), {}
    for own, layer in conversion.items():
        theirs = str(getattr(layer, "value", layer))
        if theirs not in STANDARD:
            faults.add(f"{own}: {theirs} is no layer that can be converted to")
        elif own not in STANDARD[theirs]:
            names[own] = STANDARD[theirs][0]
    result: dict[str, Any] = {}
    for name, value in state.items():
        new = _renamed(name, names)
        if new in result:
            faults.add(f"two tensors stand for {new}")
        result[new] = value
    faults.raise_if_any()
    return result


def _renamed(name: str, names: Mapping[str, str]) -> str:
    match = _NUMBER.search(name)
    bare = _NUMBER.sub("", name, count=1) if match else name
    if bare not in names:
        return name
    new = names[bare]
    return new.replace("layers.", f"layers.{match[1]}.", 1) if match else new
