"""The families that are known, from the most particular to the most general."""

from __future__ import annotations

from dist_export.errors import ExportError
from dist_export.models.config import ModelConfig
from dist_export.models.gpt import GPT
from dist_export.models.llama import LLAMA
from dist_export.models.mixtral import MIXTRAL
from dist_export.models.nemotron import NEMOTRON
from dist_export.models.rules import Family

FAMILIES: tuple[Family, ...] = (NEMOTRON, MIXTRAL, LLAMA, GPT)


def choose_family(config: ModelConfig, name: str | None = None) -> Family:
    """The family of a model: the one named, or the first whose conditions it meets.

    Raises `ExportError` with every family's reasons when none fits.
    """
    if name is not None and name not in {family.name for family in FAMILIES}:
        raise ExportError(f"--family {name}: unknown; known: {', '.join(f.name for f in FAMILIES)}")
    reasons = {}
    for family in FAMILIES:
        if name in (None, family.name):
            reasons[family.name] = family.unmet(config)
            if not reasons[family.name]:
                return family
    listed = "\n".join(f"  - not {family}: {'; '.join(why)}" for family, why in reasons.items())
    raise ExportError(f"the model belongs to no known family:\n{listed}")
