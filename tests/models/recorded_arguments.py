"""Arguments and folded shapes of real checkpoints, and small changes to them.

The JSON files hold what Megatron-LM itself saved (plain values only): 0.16 for GPT-2, Llama and Mixtral style
models, the development branch of August 2026 for Llama.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dist_export.models.provenance import ResolvedConfig
from dist_export.models.resolve import parse_override, resolve_config

DATA = Path(__file__).parent / "data"
GPT2, LLAMA, LLAMA_MAIN, MIXTRAL = "gpt2_core-0.16", "llama_core-0.16", "llama_main-2026-08", "mixtral_core-0.16"
NAMES = (GPT2, LLAMA, LLAMA_MAIN, MIXTRAL)

LAYER = "decoder.layers.{layer}."
ABSENT = object()  # as a changed value: the entry is removed


class Checkpoint:
    """A real checkpoint's description that a test may change before resolving it."""

    def __init__(self, name: str) -> None:
        content = json.loads((DATA / f"{name}.json").read_text())
        self.arguments: dict[str, Any] | None = content["arguments"]
        self.shapes: dict[str, tuple[int, ...]] = {key: tuple(shape) for key, shape in content["shapes"].items()}
        self.num_layers: int = content["num_layers_found"]
        self.overrides: dict[str, tuple[object, str]] = {}

    def args(self, **changes: object) -> Checkpoint:
        assert self.arguments is not None
        self.arguments = _changed(self.arguments, changes)
        return self

    def without_arguments(self) -> Checkpoint:
        self.arguments = None
        return self

    def shape(self, changes: dict[str, Any]) -> Checkpoint:
        self.shapes = _changed(self.shapes, changes)
        return self

    def set(self, *settings: str) -> Checkpoint:
        for setting in settings:
            field, text = setting.split("=", 1)
            self.overrides[field] = (parse_override(field, text), "command line")
        return self

    def resolve(self) -> ResolvedConfig:
        return resolve_config(
            arguments=self.arguments,
            shapes=self.shapes,
            num_layers_found=self.num_layers,
            overrides=self.overrides,
        )

    def value(self, field: str) -> object:
        return getattr(self.resolve().config, field)


def _changed(mapping: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = mapping | changes
    return {key: value for key, value in merged.items() if value is not ABSENT}
