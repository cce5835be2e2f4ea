"""The plan of a whole export: one configuration file and one shard plan per output file."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

from dist_export.errors import Faults
from dist_export.models.catalog import SourceCatalog
from dist_export.models.logical import unexpected_sources
from dist_export.models.provenance import ResolvedConfig
from dist_export.models.rules import Family
from dist_export.plan.layout import TargetLayout
from dist_export.plan.shard import ShardPlan, ShardPlanner
from dist_export.plan.work import slab_shape
from dist_export.tensors.boxes import Box, uncovered_elements
from dist_export.tensors.views import Slab


@dataclass(frozen=True, slots=True)
class ExportPlan:
    """Everything an export will write, decided from metadata alone. Frozen; printable; the same on every rank."""

    family: Family
    architecture: str
    releases: tuple[str, ...]
    resolved: ResolvedConfig
    layout: TargetLayout
    planner: ShardPlanner
    config: Mapping[str, object]
    """The contents of config.json."""
    notes: tuple[str, ...]
    _shards: dict[int, ShardPlan] = field(default_factory=dict)

    @property
    def catalog(self) -> SourceCatalog:
        return self.planner.logical.catalog

    @property
    def num_files(self) -> int:
        return self.layout.world_size

    def file_name(self, rank: int) -> str:
        """The output file of a target rank."""
        return f"rank{rank}.safetensors"

    def shard(self, rank: int) -> ShardPlan:
        """The plan of one output file, made on first use. `ExportError` names every fault of it."""
        if rank not in self._shards:
            faults = Faults(f"the export cannot be planned (target rank {rank})")
            self._shards[rank] = self.planner.plan(rank, file_name=self.file_name(rank), faults=faults)
            faults.raise_if_any()
        return self._shards[rank]

    def shards(self) -> dict[int, ShardPlan]:
        """All shard plans. `ExportError` with the faults of all ranks together."""
        faults = Faults("the export cannot be planned")
        for rank in range(self.num_files):
            if rank not in self._shards:
                self._shards[rank] = self.planner.plan(rank, file_name=self.file_name(rank), faults=faults)
        faults.raise_if_any()
        return {rank: self._shards[rank] for rank in range(self.num_files)}

    def digest(self) -> str:
        """SHA-256 over configuration and all shard plans, hexadecimal."""
        state = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for shard in self.shards().values():
            state.update(shard.digest().encode())
        return state.hexdigest()


def validate(plan: ExportPlan) -> dict[str, int]:
    """Prove that a plan uses every element of the model and writes every element once.

    Returns reason -> number of source elements left out for it (padding rows of the vocabulary). Raises
    one `ExportError` with all faults: tensors without a place, pieces that overlap or leave gaps, source
    elements that no target tensor takes.
    """
    faults = unexpected_sources(plan.catalog, plan.family.source_rules, plan.resolved.config)
    faults.raise_if_any()
    faults = Faults("the plan is not a partition")
    used: dict[Slab, set[Box]] = defaultdict(set)
    for rank, shard in plan.shards().items():
        for tensor in shard.tensors:
            faults.extend(f"rank {rank}: {tensor.name}: {fault}" for fault in tensor.view.faults())
            for piece in tensor.view.pieces:
                if piece.slab is not None:
                    size = piece.box.size[len(piece.box.size) - len(piece.source_start) :]
                    used[piece.slab].add(Box(piece.source_start, size))
    left_out = _check_coverage(plan, used, faults)
    faults.raise_if_any()
    return left_out


def _check_coverage(plan: ExportPlan, used: Mapping[Slab, set[Box]], faults: Faults) -> dict[str, int]:
    config, catalog = plan.resolved.config, plan.catalog
    padding = config.padded_vocab_size - config.vocab_size
    left_out: dict[str, int] = defaultdict(int)
    for slab in catalog.slabs():
        shape = slab_shape(slab, catalog.tensors)
        missing = uncovered_elements(used.get(slab, ()), shape)
        is_table = len(shape) == 2 and shape[0] == config.padded_vocab_size and bool(used.get(slab))
        if missing and is_table and missing == padding * shape[1]:
            left_out["padding rows of the vocabulary"] += missing
        elif missing:
            faults.add(f"{slab}: {missing} of its {Box.whole(shape).num_elements} elements go nowhere")
    return dict(left_out)
