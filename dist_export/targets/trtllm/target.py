"""The TensorRT-LLM target: from an opened checkpoint and options to an export plan."""

from __future__ import annotations

from dataclasses import dataclass, field

from dist_export.models.catalog import SourceCatalog
from dist_export.models.logical import LogicalModel
from dist_export.models.provenance import ResolvedConfig
from dist_export.models.rules import Family
from dist_export.plan.export import ExportPlan
from dist_export.plan.layout import TargetLayout
from dist_export.plan.shard import ShardPlanner
from dist_export.targets.trtllm.config import ServingOptions, build_config, engine_faults, model_notes
from dist_export.targets.trtllm.releases import check_config, parse_release, releases_for, split_layers
from dist_export.targets.trtllm.tables import TABLES, EmbeddingSharding
from dist_export.tensors.dtypes import dtype_by_name

DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrtllmOptions:
    """What the user chooses of a TensorRT-LLM export."""

    tp_size: int = 1
    pp_size: int = 1
    dtype: str = "bfloat16"
    embedding: EmbeddingSharding = field(default_factory=EmbeddingSharding)
    release: str | None = None
    """As given to ``--trtllm-version``; None means every release that has the model class."""


def plan_export(
    family: Family, resolved: ResolvedConfig, catalog: SourceCatalog, options: TrtllmOptions
) -> ExportPlan:
    """The export plan, from metadata alone. Raises `ExportError` for anything the target cannot express."""
    architecture = family.architectures["trtllm"]
    releases = releases_for(architecture, parse_release(options.release) if options.release else None)
    stages = split_layers(resolved.config.num_layers, options.pp_size, releases)
    layout = TargetLayout(options.tp_size, options.pp_size, stages)
    engine_faults(architecture, resolved.config, layout).raise_if_any()
    serving = ServingOptions(options.dtype, options.embedding)
    config = build_config(architecture, resolved.config, layout, serving)
    check_config(config, releases)
    logical = LogicalModel(catalog, family.source_rules, resolved.config)
    planner = ShardPlanner(TABLES[architecture](options.embedding), logical, layout, dtype_by_name(options.dtype))
    return ExportPlan(
        family=family,
        architecture=architecture,
        releases=releases,
        resolved=resolved,
        layout=layout,
        planner=planner,
        config=config,
        notes=(*resolved.notes, *model_notes(resolved.config)),
    )
