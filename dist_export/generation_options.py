"""How text is generated, whatever generates it. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationOptions:
    """How to continue."""

    max_new_tokens: int = 16
    temperature: float = 0.0
    """0: the likeliest token, of equal ones the first."""
    seed: int = 0
    stop_token: int | None = None
