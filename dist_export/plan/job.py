"""A job: one or more targets exported in one pass, so that no source byte is read twice."""

from __future__ import annotations

import hashlib

from msgspec import Struct, field

from dist_export.errors import ExportError
from dist_export.models.catalog import SourceCatalog
from dist_export.plan.export import ExportPlan, ShardSummary, validate
from dist_export.plan.shard import ShardPlan


class ExportJob(Struct, frozen=True):
    """Export plans of one checkpoint. Their files are numbered through, in order of the plans."""

    plans: tuple[ExportPlan, ...]
    _left_out: dict[str, dict[str, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        folders = [plan.folder for plan in self.plans]
        if not folders or len(set(folders)) != len(folders):
            raise ExportError(f"each target can be given once; given: {', '.join(p.target for p in self.plans)}")

    @property
    def catalog(self) -> SourceCatalog:
        return self.plans[0].catalog

    @property
    def num_files(self) -> int:
        return sum(plan.num_files for plan in self.plans)

    def numbered(self, plan: ExportPlan) -> range:
        """The job's numbers of a plan's files."""
        start = 0
        for other in self.plans:
            if other is plan:
                return range(start, start + plan.num_files)
            start += other.num_files
        raise AssertionError("the plan is not of this job")

    def plan_of(self, number: int) -> tuple[ExportPlan, int]:
        """The plan of a file and the file's number within it."""
        for plan in self.plans:
            if number < plan.num_files:
                return plan, number
            number -= plan.num_files
        raise AssertionError("the file is not of this job")

    def shard(self, number: int) -> ShardPlan:
        """The shard plan of a file, made on first use."""
        plan, within = self.plan_of(number)
        return plan.shard(within)

    def shards(self) -> dict[int, ShardPlan]:
        """All shard plans by number."""
        return dict(enumerate(shard for plan in self.plans for shard in plan.shards().values()))

    def summaries(self) -> list[ShardSummary]:
        """What all processes must agree on, per file."""
        return [summary for plan in self.plans for summary in plan.summaries()]

    def summary(self, number: int) -> ShardSummary:
        """What all processes must agree on about one file."""
        plan, within = self.plan_of(number)
        return plan.summary(within)

    def path(self, number: int) -> str:
        """The path of a file within the output."""
        plan, within = self.plan_of(number)
        return f"{plan.folder}/{plan.shard(within).file_name}"

    def digest(self) -> str:
        """SHA-256 over all plans, hexadecimal."""
        return hashlib.sha256("".join(plan.digest() for plan in self.plans).encode()).hexdigest()

    def validate(self) -> dict[str, dict[str, int]]:
        """Per target what is left out of the source and why; `ExportError` for anything lost.

        Done once: processes forked afterwards have the answer.
        """
        if not self._left_out:
            self._left_out.update({plan.target: validate(plan) for plan in self.plans})
        return self._left_out
