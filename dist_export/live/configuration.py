"""Arguments of a live model, from Megatron's ``TransformerConfig`` and what ``GPTModel`` was given beside it."""

from __future__ import annotations

import dataclasses
import math
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
    """`MODEL_FIELDS` of a ``GPTModel``, which keeps most as attributes; the rest is read off its rotary frequencies.

    Attributes by release (megatron/core/models/gpt/gpt_model.py): ``rotary_percent`` since 0.6, ``rotary_base`` and
    ``rotary_scaling`` since 0.10; the factor of the latter is kept by none. Raises `ExportError` for frequencies that
    are no rotary embedding's.
    """
    while hasattr(model, "module") and not hasattr(model, "position_embedding_type"):
        model = model.module  # DDP, Float16Module
    rotary = getattr(model, "rotary_pos_emb", None)
    fields: dict[str, object] = {
        "position_embedding_type": model.position_embedding_type,
        "max_position_embeddings": getattr(model, "max_position_embeddings", None)
        or getattr(model, "max_sequence_length", None),
        "share_embeddings_and_output_weights": model.share_embeddings_and_output_weights,
        "rotary_percent": getattr(model, "rotary_percent", None),
        "rotary_base": getattr(model, "rotary_base", None),
        "seq_len_interpolation_factor": getattr(rotary, "seq_len_interpolation_factor", None),
    }
    if rotary is not None and model.position_embedding_type == "rope":
        fields |= _fields_of_frequencies(rotary.inv_freq.tolist(), model, fields["rotary_base"])
    return {name: value for name, value in fields.items() if value is not None}


def _fields_of_frequencies(frequencies: list[float], model: Any, base: Any) -> dict[str, object]:
    """What a ``GPTModel`` does not keep of its rotary embedding: frequency ``i`` is ``base ** (-i / count)``."""
    count, found = len(frequencies), dict[str, object]()
    if getattr(model, "rotary_percent", None) is None:
        found["rotary_percent"] = 2 * count / model.config.kv_channels
    if base is None and count > 1:
        base = frequencies[-1] ** (-count / (count - 1))
        found["rotary_base"] = base = round(base) if abs(base - round(base)) < _CLOSE * base else base
    if getattr(model, "rotary_scaling", False):
        found |= {"rope_scaling": True, "rope_scaling_factor": _scaling_factor(frequencies, base)}
    return found


_CLOSE = 1e-5
"""Relative; frequencies are float32."""
_LOW_WAVE, _HIGH_WAVE = 8192.0, 2048.0
"""Wave lengths from which on Llama 3.1's scaling divides, and up to which it leaves frequencies as they are."""


def _scaling_factor(frequencies: list[float], base: float) -> float:
    """The factor of Llama 3.1's scaling (rotary_pos_embedding.py, ``_apply_scaling``), from the longest wave."""
    count = len(frequencies)
    plain = base ** (-(count - 1) / count)
    wave, ratio = 2 * math.pi / plain, frequencies[-1] / plain
    if wave <= _HIGH_WAVE:
        return 8.0  # GPTModel's default: no wave is long enough to be scaled, whatever the factor
    kept = max(0.0, (_LOW_WAVE / wave - 1.0) / 3.0)  # the part that is not divided
    factor = (1.0 - kept) / (ratio - kept) if ratio > kept else 0.0
    if not factor >= 1.0 - _CLOSE:
        raise ExportError(
            f"the model's rotary frequencies are not those of base {base:g} with Llama 3.1's scaling (the longest wave "
            f"is {1 / ratio:g} times itself): give rope_scaling_factor among model_fields"
        )
    return round(factor, 3)


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
