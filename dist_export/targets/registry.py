"""The targets that are known: what every part of the program that goes by target asks for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from msgspec import Struct

from dist_export.checkpoint.quantizer_scheme import Scheme
from dist_export.plan.export import ExportPlan
from dist_export.targets.huggingface import quantization as huggingface_quantization
from dist_export.targets.huggingface import target as huggingface
from dist_export.targets.trtllm import quantization as trtllm_quantization
from dist_export.targets.trtllm import target as trtllm


class Target(Struct, frozen=True, kw_only=True):
    """Something that exports are made for."""

    name: str
    """As ``--target`` and the manifest have it, and the keys of `Family.architectures`."""
    title: str
    """For people."""
    runtimes: str
    """What loads its exports."""
    options: Any
    """The class of what the user chooses; ``from_plain`` makes it from a manifest's values."""
    plan_export: Callable[..., ExportPlan]
    """(family, resolved configuration, catalog, options, quantization=, folder=) -> the plan, from metadata alone."""
    schemes: tuple[Scheme, ...] = ()
    """How its files can be quantised."""


TARGETS: tuple[Target, ...] = (
    Target(
        name=trtllm.NAME,
        title="TensorRT-LLM",
        runtimes="TensorRT-LLM",
        options=trtllm.TrtllmOptions,
        plan_export=trtllm.plan_export,
        schemes=tuple(trtllm_quantization.DIALECT.names),
    ),
    Target(
        name=huggingface.NAME,
        title="Hugging Face",
        runtimes="vLLM, SGLang and TensorRT-LLM's PyTorch backend",
        options=huggingface.HuggingFaceOptions,
        plan_export=huggingface.plan_export,
        schemes=huggingface_quantization.SCHEMES,
    ),
)


def target_of(options: object) -> Target:
    """The target that options, an instance of its options class, are for."""
    return next(target for target in TARGETS if isinstance(options, target.options))


def target_named(name: object) -> Target | None:
    """The target of a name, or None."""
    return next((target for target in TARGETS if target.name == name), None)
