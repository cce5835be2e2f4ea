"""Arguments of a live model, from Megatron's ``TransformerConfig`` and what ``GPTModel`` was given beside it."""

from __future__ import annotations

import dataclasses
from enum import Enum
from functools import partial
from typing import Any

from dist_export.checkpoint.provider_config import provider_arguments
from dist_export.errors import ExportError

MODEL_FIELDS = (
    *("position_embedding_type", "max_position_embeddings", "rotary_percent", "rotary_base"),
    *("seq_len_interpolation_factor", "rope_scaling", "rope_scaling_factor", "share_embeddings_and_output_weights"),
)
"""Parameters of ``GPTModel`` that a `TransformerConfig` does not have."""


def arguments_of(transformer_config: Any, **model_fields: object) -> dict[str, object]:
    """What `dist_export.models.resolve` reads, as the arguments of a training run.

    `transformer_config` is any dataclass with the fields of Megatron-Core's ``TransformerConfig``; `model_fields` are
    `MODEL_FIELDS`. Raises `ExportError` when it is no such thing.
    """
    if not dataclasses.is_dataclass(transformer_config) or not hasattr(transformer_config, "num_attention_heads"):
        raise ExportError(f"{type(transformer_config).__name__} is no TransformerConfig of Megatron-Core")
    unknown = sorted(set(model_fields) - set(MODEL_FIELDS))
    if unknown:
        raise ExportError(f"{', '.join(unknown)}: no parameters of a GPTModel that an export looks at")
    names = [item.name for item in dataclasses.fields(transformer_config)]
    values = {name: _plain(getattr(transformer_config, name, None)) for name in names}
    # What a config does not say (older releases lack fields) must read as absent, not as None.
    fields = {name: value for name, value in values.items() if value is not _NO_WORD}
    return provider_arguments({**fields, **model_fields})


def model_fields_of(model: Any) -> dict[str, object]:
    """`MODEL_FIELDS` of a ``GPTModel``, which keeps them as attributes (its rope scaling in the rotary module)."""
    while hasattr(model, "module") and not hasattr(model, "position_embedding_type"):
        model = model.module  # DDP, Float16Module
    fields: dict[str, object] = {
        "position_embedding_type": model.position_embedding_type,
        "max_position_embeddings": getattr(model, "max_position_embeddings", None)
        or getattr(model, "max_sequence_length", None),
        "share_embeddings_and_output_weights": model.share_embeddings_and_output_weights,
    }
    for name in ("rotary_percent", "rotary_base"):
        if getattr(model, name, None) is not None:
            fields[name] = getattr(model, name)
    rotary = getattr(model, "rotary_pos_emb", None)
    interpolation = getattr(rotary, "seq_len_interpolation_factor", None)
    if interpolation is not None:
        fields["seq_len_interpolation_factor"] = interpolation
    return fields


def layout_arguments(*, tp: int, pp: int, ep: int = 1, expert_tp: int | None = None) -> dict[str, object]:
    """Sizes of a training layout under Megatron's names."""
    return {
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": pp,
        "expert_model_parallel_size": ep,
        "expert_tensor_parallel_size": expert_tp or tp,
    }


_NO_WORD = object()


def _plain(value: Any) -> object:
    """Numbers, words and lists of them as they are, functions and members of enumerations by name."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, list | tuple) and all(isinstance(each, bool | int | float | str) for each in value):
        return list(value)
    if isinstance(value, partial):
        return "gelu_tanh" if value.keywords.get("approximate") == "tanh" else _NO_WORD
    if callable(value) and hasattr(value, "__name__"):
        return str(value.__name__)
    return _NO_WORD
