"""How a model class of TensorRT-LLM is described: its tensors, its fields in config.json, and what it cannot do.

A family module holds one `EngineModel` (several where a class changed between releases); everything that the
target does with a model it reads off that value.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from msgspec import Struct

from dist_export.errors import ExportError, Faults
from dist_export.models.config import ModelConfig
from dist_export.models.rules import TargetRule
from dist_export.plan.layout import TargetLayout
from dist_export.targets.trtllm.releases import ALL, RELEASES, Keys, Span, described
from dist_export.targets.trtllm.tables import EmbeddingSharding

Limit = tuple[Callable[[ModelConfig], bool], str]
"""What a model must be for the class to express it, and what to say where it is not."""

DTYPES = ("bfloat16", "float16", "float32")


class ReleaseLimit(Struct, frozen=True):
    """Something that the class cannot do in some releases only."""

    releases: Span
    holds: Callable[[ModelConfig, TargetLayout], bool]
    message: str


def no_notes(model: ModelConfig) -> list[str]:
    """The class computes the model as it was trained."""
    return []


class EngineModel(Struct, frozen=True, kw_only=True):
    """A model class as its releases' tensorrt_llm/models/<class>/{model,config}.py have it."""

    name: str
    """``architecture`` in config.json."""
    rules: Callable[[EmbeddingSharding], tuple[TargetRule, ...]]
    fields: Callable[[ModelConfig], dict[str, object]]
    """What config.json holds besides the fields that every class has; an equal key replaces the common value."""
    limits: tuple[Limit, ...]
    keys: Keys
    releases: Span = ALL
    release_limits: tuple[ReleaseLimit, ...] = ()
    dtypes: tuple[str, ...] = DTYPES
    notes: Callable[[ModelConfig], list[str]] = no_notes
    """What the user should know about how the class computes the model, beyond what holds for every class."""

    def valid_releases(
        self, model: ModelConfig, layout: TargetLayout, dtype: str, wanted: str | None
    ) -> tuple[str, ...]:
        """The releases an export can be served by: the one wanted, or all that can.

        Raises `ExportError` with the reasons when there is none.
        """
        if dtype not in self.dtypes:
            raise ExportError(f"{self.name} is served in {', '.join(self.dtypes)}, not in {dtype}")
        candidates = (wanted,) if wanted else tuple(release for release in RELEASES if release in self.releases)
        valid = tuple(each for each in candidates if not self._reasons(each, model, layout))
        if valid:
            return valid
        faults = Faults(f"{self.name} of TensorRT-LLM {described(candidates)} cannot serve this export ({layout})")
        faults.extend(dict.fromkeys(reason for each in candidates for reason in self._reasons(each, model, layout)))
        raise ExportError(str(faults))

    def _reasons(self, release: str, model: ModelConfig, layout: TargetLayout) -> list[str]:
        if release not in self.releases:
            return [f"the class is in TensorRT-LLM {self.releases}, not in {release}"]
        return [
            f"{limit.message} (TensorRT-LLM {limit.releases})"
            for limit in self.release_limits
            if release in limit.releases and not limit.holds(model, layout)
        ]


def choose_engine(engines: Sequence[EngineModel], wanted: str | None) -> EngineModel:
    """The class for a release; without one, that of the newest releases."""
    for engine in engines:
        if wanted is not None and wanted in engine.releases:
            return engine
    if wanted is None or len(engines) == 1:
        return engines[-1]  # one class: `valid_releases` says why it does not do
    spans = ", ".join(str(engine.releases) for engine in engines)
    raise ExportError(f"{engines[-1].name} is in TensorRT-LLM {spans}, not in {wanted}")
