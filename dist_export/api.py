"""The public functions. Each takes values and returns values; the command line is a thin layer over them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dist_export.checkpoint.open import Checkpoint, open_checkpoint
from dist_export.models.catalog import SourceCatalog
from dist_export.models.provenance import ResolvedConfig
from dist_export.models.registry import choose_family
from dist_export.models.resolve import resolve_config
from dist_export.plan.export import ExportPlan
from dist_export.plan.job import ExportJob
from dist_export.targets.huggingface import target as huggingface_target
from dist_export.targets.huggingface.target import HuggingFaceOptions
from dist_export.targets.trtllm import target as trtllm_target
from dist_export.targets.trtllm.target import TrtllmOptions

TargetOptions = TrtllmOptions | HuggingFaceOptions
"""What the user chooses of a target; its type says which one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A checkpoint as a person names it, with what they say about it."""

    checkpoint: Path
    iteration: int | None = None
    overrides: Mapping[str, tuple[object, str]] = field(default_factory=dict)
    """Configuration field -> (value, where it was given)."""
    family: str | None = None
    index_cache: Path | None = None
    """A file to keep the parsed metadata in."""


@dataclass(frozen=True, slots=True)
class OpenedModel:
    """A checkpoint and what is known about the model in it."""

    checkpoint: Checkpoint
    catalog: SourceCatalog
    resolved: ResolvedConfig


def open_model(source: Source, checkpoint: Checkpoint | None = None) -> OpenedModel:
    """Open a checkpoint (unless it is given) and resolve its model configuration. Reads metadata only.

    Raises `ExportError` when it cannot be read or its configuration is contradictory or incomplete.
    """
    checkpoint = checkpoint or open_checkpoint(
        source.checkpoint, iteration=source.iteration, index_cache=source.index_cache
    )
    catalog = SourceCatalog(checkpoint.index.shapes())
    resolved = resolve_config(
        arguments=checkpoint.arguments,
        shapes=catalog.folded_shapes(),
        num_layers_found=catalog.num_layers,
        overrides=source.overrides,
    )
    return OpenedModel(checkpoint, catalog, resolved)


def plan(model: OpenedModel, options: TargetOptions, *, family: str | None = None, folder: str = ".") -> ExportPlan:
    """The plan of an export to one target. Pure; raises `ExportError` for what cannot be exported, and why."""
    chosen = choose_family(model.resolved.config, family)
    if isinstance(options, HuggingFaceOptions):
        return huggingface_target.plan_export(chosen, model.resolved, model.catalog, options, folder=folder)
    return trtllm_target.plan_export(chosen, model.resolved, model.catalog, options, folder=folder)


def plan_job(model: OpenedModel, targets: Sequence[TargetOptions], *, family: str | None = None) -> ExportJob:
    """The plans of all targets; several of them go to subfolders named like the targets."""
    alone = len(targets) == 1
    return ExportJob(
        tuple(plan(model, each, family=family, folder="." if alone else target_name(each)) for each in targets)
    )


def target_name(options: TargetOptions) -> str:
    """``hf`` or ``trtllm``."""
    return huggingface_target.NAME if isinstance(options, HuggingFaceOptions) else trtllm_target.NAME
