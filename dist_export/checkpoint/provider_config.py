"""Model configurations of NeMo 2 and Megatron-Bridge as arguments.

Both describe a model by the fields of Megatron-Core's `TransformerConfig` and those of GPTModel (NeMo
nemo/collections/llm/gpt/model/base.py, `GPTConfig`; Megatron-Bridge models/gpt_provider.py, `GPTModelProvider`, and
models/gpt/gpt_builder.py, `GPTModelConfig`), with all defaults written out. The names that a `TransformerConfig` and
Megatron-LM's arguments have in common are left alone; models/megatron_arguments.py knows both.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from dist_export.checkpoint.plain_text import plain

_LLAMA31 = {  # nemo/collections/llm/gpt/model/llama.py, `Llama31Config`
    "scale_factor": "rope_scaling_factor",
    "low_freq_factor": "rope_scaling_low_freq_factor",
    "high_freq_factor": "rope_scaling_high_freq_factor",
    "old_context_len": "rope_scaling_original_max_position_embeddings",
}
_SCALED_EMBEDDINGS = re.compile(r"(^|\.)\w*Gemma\w*$")
"""Classes of which the model multiplies its word embeddings by sqrt(hidden_size) without a field that says so
(nemo/collections/llm/gpt/model/gemma.py; megatron/bridge/models/gemma/gemma_provider.py)."""


def provider_arguments(config: Mapping[str, Any]) -> dict[str, object]:
    """A provider's fields, flat or with the `TransformerConfig` inside as ``transformer``, under names of arguments."""
    inner = config.get("transformer")
    fields = {**config, **inner} if isinstance(inner, Mapping) else dict(config)
    arguments = {name: plain(value) for name, value in fields.items() if not name.startswith("_")}
    target = str(config.get("_target_"))
    if _SCALED_EMBEDDINGS.search(target):
        arguments["apply_embedding_scaling"] = True
    if "scale_factor" in arguments and "old_context_len" in arguments:
        arguments["rope_scaling"] = True
        arguments |= {new: arguments[old] for old, new in _LLAMA31.items() if old in arguments}
    _derive(arguments)
    return arguments


def _derive(arguments: dict[str, object]) -> None:
    """What `TransformerConfig.__post_init__` and `GPTModel` make of fields that are left out."""
    hidden, heads = arguments.get("hidden_size"), arguments.get("num_attention_heads")
    if arguments.get("kv_channels") is None and type(hidden) is int and type(heads) is int and heads > 0:
        arguments["kv_channels"] = hidden // heads
    if arguments.get("max_position_embeddings") is None:  # GPTModel gets seq_length as max_sequence_length
        arguments["max_position_embeddings"] = arguments.get("seq_length", arguments.get("max_sequence_length"))
