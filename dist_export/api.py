"""The public functions. Each takes values and returns values; the command line is a thin layer over them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msgspec import Struct, field
from msgspec.structs import replace

from dist_export.checkpoint.adapters import is_adapter
from dist_export.checkpoint.open import Checkpoint, open_checkpoint
from dist_export.families.registry import choose_family
from dist_export.models.catalog import SourceCatalog
from dist_export.models.logical import LogicalModel
from dist_export.models.provenance import ResolvedConfig
from dist_export.models.quantization import Quantization, QuantizerTensors, unpacked_shapes
from dist_export.models.resolve import resolve_config
from dist_export.models.rules import Family
from dist_export.plan.export import ExportPlan
from dist_export.plan.job import ExportJob
from dist_export.quantization import QuantizationOptions, States, decide, read_quantiser_states
from dist_export.targets.huggingface.target import HuggingFaceOptions
from dist_export.targets.registry import target_of
from dist_export.targets.trtllm.target import TrtllmOptions

if TYPE_CHECKING:
    from dist_export.families.mapping import CodeMapping, ModelMapping

TargetOptions = TrtllmOptions | HuggingFaceOptions
"""What the user chooses of a target; its type says which one."""


class Source(Struct, frozen=True, kw_only=True):
    """A checkpoint as a person names it, with what they say about it."""

    checkpoint: Path
    iteration: int | None = None
    overrides: Mapping[str, tuple[object, str]] = field(default_factory=dict)
    """Configuration field -> (value, where it was given)."""
    family: str | None = None
    index_cache: Path | None = None
    """A file to keep the parsed metadata in."""
    base: Path | None = None
    """The model that the adapters of the checkpoint are merged into."""
    master_weights: bool = False
    """Take the fp32 weights out of the optimizer's state."""
    quantization: QuantizationOptions = field(default_factory=QuantizationOptions)
    calibration: Path | None = None
    """A safetensors file with the amax values of quantisers."""
    mapping: ModelMapping | CodeMapping | None = None
    """The user's own rules, in place of a family's."""


class OpenedModel(Struct, frozen=True):
    """A checkpoint and what is known about the model in it."""

    checkpoint: Checkpoint
    catalog: SourceCatalog
    resolved: ResolvedConfig
    quantizers: QuantizerTensors
    options: QuantizationOptions
    mapping: ModelMapping | CodeMapping | None = None
    _states: list[States] = field(default_factory=list)

    def quantization(self, family: Family) -> Quantization | None:
        """How its export quantises, None when it does not. Reads the quantisers' states on first use."""
        if not self._states:
            self._states.append(read_quantiser_states(self.checkpoint, self.quantizers, self.options))
        logical = LogicalModel(self.catalog, family.source_rules, self.resolved.config)
        return decide(self._states[0], self.quantizers, logical, self.options)


def open_model(source: Source, checkpoint: Checkpoint | None = None) -> OpenedModel:
    """Open a checkpoint (unless it is given) and resolve its model configuration. Reads metadata only.

    Raises `ExportError` when it cannot be read or its configuration is contradictory or incomplete.
    """
    checkpoint = checkpoint or open_checkpoint(
        source.checkpoint,
        iteration=source.iteration,
        index_cache=source.index_cache,
        base=source.base,
        master_weights=source.master_weights,
    )
    if source.calibration is not None:
        from dist_export.checkpoint.calibration import with_calibration

        checkpoint = replace(checkpoint, index=with_calibration(checkpoint.index, source.calibration))
    shapes = checkpoint.index.shapes()
    quantizers = QuantizerTensors.of(shapes, lambda name: checkpoint.index.tensors[name].num_chunks)
    quantised = quantizers.names
    catalog = SourceCatalog({n: each for n, each in shapes.items() if not is_adapter(n) and n not in quantised})
    resolved = resolve_config(
        arguments=checkpoint.arguments,
        shapes=unpacked_shapes(catalog),
        num_layers_found=catalog.num_layers,
        overrides=source.overrides,
    )
    if checkpoint.adapters is not None:
        from dist_export.models.adapters import updates_of

        catalog.updates = updates_of(checkpoint.index, checkpoint.adapters, catalog, resolved.config)
    return OpenedModel(checkpoint, catalog, resolved, quantizers, source.quantization, source.mapping)


def plan(model: OpenedModel, options: TargetOptions, *, family: str | None = None, folder: str = ".") -> ExportPlan:
    """The plan of an export to one target. Pure; raises `ExportError` for what cannot be exported, and why."""
    config = model.resolved.config
    chosen = choose_family(config, family) if model.mapping is None else model.mapping.family(config)
    more: dict[str, Any] = {"quantization": model.quantization(chosen), "folder": folder}
    return target_of(options).plan_export(chosen, model.resolved, model.catalog, options, **more)


def plan_job(model: OpenedModel, targets: Sequence[TargetOptions], *, family: str | None = None) -> ExportJob:
    """The plans of all targets; several of them go to subfolders named like the targets."""
    alone = len(targets) == 1
    return ExportJob(
        tuple(plan(model, each, family=family, folder="." if alone else target_name(each)) for each in targets)
    )


def target_name(options: TargetOptions) -> str:
    """``hf`` or ``trtllm``."""
    return target_of(options).name
