"""The families that are known, from the most particular to the most general."""

from __future__ import annotations

from dist_export.errors import ExportError
from dist_export.families.decilm import DECILM
from dist_export.families.deepseek_v2 import DEEPSEEK_V2
from dist_export.families.deepseek_v3 import DEEPSEEK_V3
from dist_export.families.falcon import FALCON
from dist_export.families.gemma import GEMMA
from dist_export.families.gemma2 import GEMMA2
from dist_export.families.gpt import GPT
from dist_export.families.gpt_oss import GPT_OSS
from dist_export.families.llama import LLAMA
from dist_export.families.mistral import MISTRAL
from dist_export.families.mixtral import MIXTRAL
from dist_export.families.nemotron import NEMOTRON
from dist_export.families.qwen2 import QWEN2
from dist_export.families.qwen2_moe import QWEN2_MOE
from dist_export.families.qwen3 import QWEN3
from dist_export.families.qwen3_moe import QWEN3_MOE
from dist_export.families.starcoder import STARCODER
from dist_export.families.starcoder2 import STARCODER2
from dist_export.models.config import ModelConfig
from dist_export.models.features import unsupported
from dist_export.models.rules import Family

FAMILIES: tuple[Family, ...] = (
    *(DEEPSEEK_V3, DEEPSEEK_V2, DECILM, GPT_OSS, NEMOTRON, GEMMA2, GEMMA, FALCON),
    *(QWEN3_MOE, QWEN2_MOE, MIXTRAL, QWEN3, QWEN2, MISTRAL, LLAMA),
    *(STARCODER2, STARCODER, GPT),
)


def choose_family(config: ModelConfig, name: str | None = None) -> Family:
    """The family of a model: the one named, or the first whose conditions it meets.

    Raises `ExportError` with every family's reasons when none fits.
    """
    if name is not None and name not in {family.name for family in FAMILIES}:
        raise ExportError(f"--family {name}: unknown; known: {', '.join(f.name for f in FAMILIES)}")
    reasons = {}
    for family in FAMILIES:
        if name in (None, family.name):
            reasons[family.name] = unsupported(config, family.features) + family.unmet(config)
            if not reasons[family.name] and (name or family.implied(config)):
                return family
    listed = "\n".join(f"  - not {family}: {'; '.join(why)}" for family, why in reasons.items())
    raise ExportError(f"the model belongs to no known family:\n{listed}")
