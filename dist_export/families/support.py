"""What is supported: a table made from the registry, so that it says what the code does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from msgspec import Struct

from dist_export.families.registry import FAMILIES
from dist_export.models.rules import Architecture, Family
from dist_export.targets import registry
from dist_export.targets.trtllm.architecture import DTYPES, EngineModel
from dist_export.targets.trtllm.releases import ALL

TARGETS = {target.name: target.title for target in registry.TARGETS}
HEADINGS = ("family", "target", "architecture", "releases", "limits", "element types", "witness")


class Row(Struct, frozen=True):
    """A model class that serves a family."""

    family: str
    target: str
    architecture: str
    releases: str
    limits: str
    dtypes: str
    witness: str

    @property
    def cells(self) -> tuple[str, ...]:
        """In the order of the headings."""
        return (
            *(self.family, self.target, self.architecture, self.releases, self.limits),
            *(self.dtypes, self.witness),
        )


def rows() -> Iterator[Row]:
    """Every class of every family, in the registry's order; a target that cannot serve a family has a row."""
    for family in FAMILIES:
        for target, name in TARGETS.items():
            found = family.architectures.get(target, ())
            if not found:
                yield Row(family.name, name, "none", "", family.unserved.get(target, ""), "", "")
            for each in found:
                yield _row(family, target, each)


def _row(family: Family, target: str, each: Architecture) -> Row:
    witness = family.witnesses.get(target, "")
    if isinstance(each, EngineModel):
        limits = "; ".join(
            dict.fromkeys(
                limit.message if limit.releases == ALL else f"{limit.message} ({limit.releases})"
                for limit in each.release_limits
            )
        )
        return Row(family.name, TARGETS[target], each.name, str(each.releases), limits, ", ".join(each.dtypes), witness)
    return Row(family.name, TARGETS[target], each.name, "", "", ", ".join(DTYPES), witness)


def quantization_rows() -> Iterator[tuple[str, ...]]:
    """(scheme, whether the files of each target hold it …)."""
    for scheme in dict.fromkeys(scheme for target in registry.TARGETS for scheme in target.schemes):
        yield scheme.value, *(_yes(scheme in target.schemes) for target in registry.TARGETS)


def _yes(holds: bool) -> str:
    return "yes" if holds else "no"


def markdown() -> str:
    """The README's tables."""
    families = _table(HEADINGS, [row.cells for row in rows()])
    quantised = _table(("quantisation", *TARGETS.values()), list(quantization_rows()))
    return f"{families}\n\n{quantised}"


def _table(headings: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def text() -> str:
    """For a terminal: a family per paragraph."""
    lines = []
    for family in FAMILIES:
        lines.append(f"{family.name}: {family.description}")
        for row in (row for row in rows() if row.family == family.name):
            where = f"  {row.target}: {row.architecture}"
            lines.append(where + (f", releases {row.releases}" if row.releases else ""))
    return "\n".join(lines)
