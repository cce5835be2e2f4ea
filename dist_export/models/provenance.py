"""Where a configuration value came from: kept for every field, shown by `inspect`, named in every error."""

from __future__ import annotations

from collections.abc import Mapping

from msgspec import Struct

from dist_export.models.config import ModelConfig


class Claim(Struct, frozen=True):
    """One source's value for one field.

    `source` is prose that stands alone: "checkpoint args: norm_epsilon", "tensor shape:
    embedding.word_embeddings.weight", "command line", "file overrides.yaml". `evidence` adds what was
    seen there, such as the shape. A default claim is Megatron's value for an argument that is absent;
    it gives way to what tensors prove.
    """

    value: object
    source: str
    evidence: str = ""
    default: bool = False

    def __str__(self) -> str:
        return f"{self.source} {self.evidence}".strip()


class ResolvedConfig(Struct, frozen=True):
    """A model configuration, the source of each of its fields, and what the user should know about it.

    `provenance` has one entry for every field of `ModelConfig`. `notes` are complete sentences.
    """

    config: ModelConfig
    provenance: Mapping[str, str]
    notes: tuple[str, ...] = ()


def from_arguments(*names: str) -> str:
    """Source text for a value read from saved training arguments called `names`."""
    return f"checkpoint args: {', '.join(names)}"


def from_tensor(name: str) -> str:
    """Source text for a value that the shape of tensor `name` proves."""
    return f"tensor shape: {name}"


def from_presence(name: str, *, present: bool) -> str:
    """Source text for a value that tensor `name` proves by being there, or by not being there."""
    return f"tensor {'present' if present else 'absent'}: {name}"


def from_default(*names: str) -> str:
    """Source text for Megatron's own default of arguments `names` that the checkpoint does not have."""
    return f"Megatron default (argument{'s' if len(names) > 1 else ''} absent: {', '.join(names)})"


def derived(text: str) -> str:
    """Source text for a value computed from other fields as Megatron computes it."""
    return f"Megatron default ({text})"
