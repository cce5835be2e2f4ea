"""How text is generated, whatever generates it. Imports no torch."""

from __future__ import annotations

from msgspec import Struct


class GenerationOptions(Struct, frozen=True, kw_only=True):
    """How to continue."""

    max_new_tokens: int = 16
    temperature: float = 0.0
    """0: the likeliest token, of equal ones the first."""
    seed: int = 0
    stop_token: int | None = None
