"""What a live ``GPTModel`` tells of itself, in every release of Megatron-Core, with the rotary embedding of this one.

The attributes of a release's ``GPTModel`` are recorded from its source (gpt_model_attributes.json, with origins).
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("megatron.core")

from dist_export.errors import ExportError
from dist_export.live.configuration import MODEL_FIELDS, model_fields_of

ATTRIBUTES = json.loads(Path(__file__).with_name("gpt_model_attributes.json").read_text())
RELEASES = [name for name in ATTRIBUTES if name != "about"]


def rotary(*, kv_channels: int, percent: float = 1.0, base: float = 10000, **more: Any) -> Any:
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

    return RotaryEmbedding(kv_channels, percent, rotary_base=base, use_cpu_initialization=True, **more)


def gpt_model(release: str, embedding: Any, *, percent: float, base: float, scaling: bool = False) -> Any:
    """A model with the attributes of a release, and no others."""
    everything = {
        "position_embedding_type": "rope",
        "max_position_embeddings": 64,
        "max_sequence_length": 64,
        "share_embeddings_and_output_weights": True,
        "rotary_percent": percent,
        "rotary_base": base,
        "rotary_scaling": scaling,
        "rotary_pos_emb": embedding,
    }
    known = {name: everything[name] for name in ATTRIBUTES[release]["GPTModel"]}
    return SimpleNamespace(config=SimpleNamespace(kv_channels=16), **known)


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize(("percent", "base"), [(1.0, 10000), (0.5, 500000)])
def test_every_field_of_every_release(release: str, percent: float, base: float) -> None:
    embedding = rotary(kv_channels=16, percent=percent, base=base, seq_len_interpolation_factor=4.0)
    fields = model_fields_of(gpt_model(release, embedding, percent=percent, base=base))
    assert fields == {
        "position_embedding_type": "rope",
        "max_position_embeddings": 64,
        "share_embeddings_and_output_weights": True,
        "rotary_percent": percent,
        "rotary_base": base,
        "seq_len_interpolation_factor": 4.0,
    }
    assert set(fields) <= set(MODEL_FIELDS)


@pytest.mark.parametrize(
    ("kv_channels", "base", "factor"), [(128, 500000, 8.0), (64, 500000, 32.0), (8, 10000, 8.0), (128, 1000000, 4.5)]
)
def test_the_factor_of_llama_31_is_read_off_the_frequencies(kv_channels: int, base: float, factor: float) -> None:
    """No release keeps it; heads of 8 have no wave longer than 8192, only one that is scaled in part."""
    embedding = rotary(kv_channels=kv_channels, base=base, rope_scaling=True, rope_scaling_factor=factor)
    fields = model_fields_of(gpt_model("0.16", embedding, percent=1.0, base=base, scaling=True))
    assert (fields["rope_scaling"], fields["rope_scaling_factor"]) == (True, pytest.approx(factor, rel=1e-3))


def test_frequencies_of_something_else_are_refused() -> None:
    model = gpt_model("0.16", rotary(kv_channels=128, base=500), percent=1.0, base=500000, scaling=True)
    with pytest.raises(ExportError, match=r"are not those of base 500000 with Llama 3\.1's scaling"):
        model_fields_of(model)


def test_wrapped_models_and_learned_positions() -> None:
    model = SimpleNamespace(
        position_embedding_type="learned_absolute", max_sequence_length=32, share_embeddings_and_output_weights=False
    )
    wrapped = SimpleNamespace(module=SimpleNamespace(module=model))
    assert model_fields_of(wrapped) == {
        "position_embedding_type": "learned_absolute",
        "max_position_embeddings": 32,
        "share_embeddings_and_output_weights": False,
    }
