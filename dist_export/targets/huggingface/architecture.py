"""How a model class of transformers is described: its tensors, its fields in config.json, what it cannot express."""

from __future__ import annotations

from collections.abc import Callable

from msgspec import Struct

from dist_export.models.config import ModelConfig
from dist_export.models.rules import TargetRule

Limit = tuple[Callable[[ModelConfig], bool], str]
"""What a model must be for the class to express it, and what to say of the class where it is not."""


class HuggingFaceModel(Struct, frozen=True, kw_only=True):
    """A model class as transformers/models/<model_type>/{modeling,configuration}_<model_type>.py have it."""

    name: str
    """The entry of ``architectures`` in config.json."""
    rules: tuple[TargetRule, ...]
    fields: Callable[[ModelConfig], dict[str, object]]
    """What config.json holds besides the fields that every class has; an equal key replaces the common value."""
    limits: tuple[Limit, ...]
    notes: Callable[[ModelConfig], tuple[str, ...]] = lambda model: ()
    """What the user should know about how the class, or what loads it, treats a model."""
