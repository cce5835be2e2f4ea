"""Export plans of small models, made from names and shapes alone."""

from __future__ import annotations

from typing import Any

from dist_export.families.registry import choose_family
from dist_export.models.catalog import SourceCatalog
from dist_export.models.resolve import resolve_config
from dist_export.plan.export import ExportPlan
from dist_export.targets.trtllm.target import TrtllmOptions, plan_export
from support.small_models import SmallModel


def catalog_of(model: SmallModel) -> SourceCatalog:
    """The catalogue of a model's tensors."""
    return SourceCatalog(
        {name: (tuple(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in model.tensors.items()}
    )


def plan_of(
    model: SmallModel, *, vocab_size: int | None = None, family: str | None = None, **options: Any
) -> ExportPlan:
    """The plan of exporting `model` with `TrtllmOptions`."""
    catalog = catalog_of(model)
    resolved = resolve_config(
        arguments=model.args,
        shapes=catalog.folded_shapes(),
        num_layers_found=catalog.num_layers,
        overrides={"vocab_size": (vocab_size, "test")} if vocab_size else {},
    )
    return plan_export(choose_family(resolved.config, family), resolved, catalog, TrtllmOptions(**options))
