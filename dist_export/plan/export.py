"""The plan of an export to one target: its files, its configuration, and the proof that nothing is lost."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

from msgspec import Struct, field

from dist_export.errors import Faults
from dist_export.models.catalog import SourceCatalog
from dist_export.models.logical import unexpected_sources
from dist_export.models.low_rank import describe
from dist_export.models.provenance import ResolvedConfig
from dist_export.models.quantization import Quantization
from dist_export.models.rules import Family
from dist_export.plan.coverage import Coverage
from dist_export.plan.shard import ShardPlan, ShardPlanner
from dist_export.tensors.boxes import Box

CONFIG = "config.json"
MAX_KEPT_PIECES = 10_000
"""Of planned tensors' views, about 1 KiB each, that validation keeps: all files of a small model, whose forked
processes then find their part planned; planning a large one again takes no time beside its export."""


class FileMaker(Protocol):
    """How a target divides its tensors among files: one per rank, or by size."""

    @property
    def num_files(self) -> int:
        """The number of files."""

    def make(self, number: int, faults: Faults) -> ShardPlan:
        """The plan of one file; problems are added to `faults`."""

    def documents(self) -> Mapping[str, object]:
        """JSON files that describe the tensor files, by name."""


class ShardSummary(Struct, frozen=True):
    """What is kept of a shard plan by processes that do not make the file."""

    file_name: str
    num_data_bytes: int
    digest: str
    """SHA-256 of the plan, hexadecimal."""


class ExportPlan(Struct, frozen=True, kw_only=True):
    """Everything an export to one target will write, decided from metadata alone. The same on every rank."""

    target: str
    """``trtllm`` or ``hf``."""
    folder: str = "."
    """Where it goes within the output: a subfolder when several targets are exported at once."""
    family: Family
    architecture: str
    resolved: ResolvedConfig
    planner: ShardPlanner
    quantization: Quantization | None = None
    files: FileMaker
    config: Mapping[str, object]
    """The contents of config.json."""
    more_documents: Mapping[str, object] = field(default_factory=dict)
    """Other JSON files, by name."""
    copies: Mapping[str, Path] = field(default_factory=dict)
    """Files taken over from elsewhere, by name: tokenizers."""
    options: Mapping[str, object]
    """What the user chose, as plain values: enough to make the plan again."""
    facts: Mapping[str, str]
    """Lines for people: layout, releases."""
    serve: tuple[str, ...] = ()
    """Commands that take the export, with ``{output}``; the first is what to do next."""
    notes: tuple[str, ...] = ()
    _shards: dict[int, ShardPlan] = field(default_factory=dict)
    _summaries: dict[int, ShardSummary] = field(default_factory=dict)

    @property
    def catalog(self) -> SourceCatalog:
        return self.planner.logical.catalog

    @property
    def num_files(self) -> int:
        return self.files.num_files

    def shard(self, number: int) -> ShardPlan:
        """The plan of one output file, made on first use and kept. `ExportError` names every fault of it."""
        if number not in self._shards:
            faults = Faults(f"the export cannot be planned (file {number})")
            shard = self.files.make(number, faults)
            faults.raise_if_any()
            self._shards[number] = shard
        return self._shards[number]

    def shards(self) -> dict[int, ShardPlan]:
        """All shard plans, kept. `ExportError` with the faults of all files together."""
        self._shards.update(enumerate(self.each_shard()))
        return dict(sorted(self._shards.items()))

    def each_shard(self) -> Iterator[ShardPlan]:
        """All shard plans one after the other; no more than the first few are kept, so memory is bounded.

        Raises `ExportError` at the end, with the faults of all files together.
        """
        faults = Faults("the export cannot be planned")
        for number in range(self.num_files):
            shard = self._shards.get(number) or self.files.make(number, faults)
            if not faults:
                self._note(number, shard)
                yield shard
        faults.raise_if_any()

    def _note(self, number: int, shard: ShardPlan) -> ShardSummary:
        """Keep the summary of a file, and its plan while there are few."""
        if sum(kept.num_pieces for kept in (*self._shards.values(), shard)) <= MAX_KEPT_PIECES:
            self._shards.setdefault(number, shard)
        self._summaries[number] = ShardSummary(shard.file_name, shard.num_data_bytes, shard.digest())
        return self._summaries[number]

    def summary(self, number: int) -> ShardSummary:
        """What all processes must agree on about one file."""
        return self._summaries.get(number) or self._note(number, self.shard(number))

    def summaries(self) -> list[ShardSummary]:
        """What all processes must agree on, per file; plans every file unless that was done before (`validate`)."""
        if len(self._summaries) < self.num_files:
            for _ in self.each_shard():
                pass
        return [self._summaries[number] for number in range(self.num_files)]

    def documents(self) -> dict[str, object]:
        """Every JSON file but the manifest; config.json is the last."""
        return {**self.more_documents, **self.files.documents(), CONFIG: self.config}

    def digest(self) -> str:
        """SHA-256 over configuration and all shard plans, hexadecimal."""
        state = hashlib.sha256(json.dumps([self.target, self.config], sort_keys=True).encode())
        for line in describe(self.catalog.updates):
            state.update(line.encode())
        for summary in self.summaries():
            state.update(summary.digest.encode())
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
    coverage = Coverage(plan.catalog.tensors)
    for shard in plan.each_shard():
        for tensor in shard.tensors:
            faults.extend(f"{shard.file_name}: {tensor.name}: {fault}" for fault in tensor.view.faults())
        coverage.add(shard)
    left_out = _check_coverage(plan, coverage, faults)
    faults.raise_if_any()
    return left_out


def _check_coverage(plan: ExportPlan, coverage: Coverage, faults: Faults) -> dict[str, int]:
    config = plan.resolved.config
    padding = config.padded_vocab_size - config.vocab_size
    left_out: dict[str, int] = defaultdict(int)
    for slab, shape, missing, used in coverage.gaps(plan.catalog.slabs()):
        is_table = len(shape) == 2 and shape[0] == config.padded_vocab_size and used
        if is_table and missing == padding * shape[1]:
            left_out["padding rows of the vocabulary"] += missing
        else:
            faults.add(f"{slab}: {missing} of its {Box.whole(shape).num_elements} elements go nowhere")
    return dict(left_out)
