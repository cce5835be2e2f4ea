"""The public functions. Each takes values and returns values; the command line is a thin layer over them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from dist_export.checkpoint.open import Checkpoint, open_checkpoint
from dist_export.models.catalog import SourceCatalog
from dist_export.models.provenance import ResolvedConfig
from dist_export.models.registry import choose_family
from dist_export.models.resolve import resolve_config
from dist_export.plan.export import ExportPlan
from dist_export.targets.trtllm.target import TrtllmOptions, plan_export

GIB = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A checkpoint as a person names it, with what they say about it."""

    checkpoint: Path
    iteration: int | None = None
    overrides: Mapping[str, tuple[object, str]] = field(default_factory=dict)
    """Configuration field -> (value, where it was given)."""
    family: str | None = None


@dataclass(frozen=True, slots=True)
class OpenedModel:
    """A checkpoint and what is known about the model in it."""

    checkpoint: Checkpoint
    catalog: SourceCatalog
    resolved: ResolvedConfig


def open_model(source: Source) -> OpenedModel:
    """Open a checkpoint and resolve its model configuration. Reads metadata only.

    Raises `ExportError` when it cannot be read or its configuration is contradictory or incomplete.
    """
    checkpoint = open_checkpoint(source.checkpoint, iteration=source.iteration)
    catalog = SourceCatalog(checkpoint.index.shapes())
    resolved = resolve_config(
        arguments=checkpoint.arguments,
        shapes=catalog.folded_shapes(),
        num_layers_found=catalog.num_layers,
        overrides=source.overrides,
    )
    return OpenedModel(checkpoint, catalog, resolved)


def plan(model: OpenedModel, options: TrtllmOptions, *, family: str | None = None) -> ExportPlan:
    """The plan of an export. Pure; raises `ExportError` for what cannot be exported, and why."""
    chosen = choose_family(model.resolved.config, family)
    return plan_export(chosen, model.resolved, model.catalog, options)
