"""Which modules of a target are quantised and how: what its configuration must list."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from msgspec import Struct

from dist_export.checkpoint.quantizer_names import ModuleName
from dist_export.checkpoint.quantizer_scheme import LinearScheme, Scheme
from dist_export.errors import ExportError
from dist_export.models.quantization import Quantization, is_linear
from dist_export.models.rules import Scope, TargetRule

Kind = tuple[Scheme, int | None]
"""A scheme and the size of its groups."""
PLAIN: Kind = (Scheme.NONE, None)


class TargetModule(Struct, frozen=True):
    """A linear of the target."""

    name: str
    """Its weight's name without ``.weight``, with the number that its layer has in the target."""
    kind: Kind
    over_experts: bool
    """Whether it holds all experts of a layer."""


def target_modules(
    rules: Iterable[TargetRule], quantization: Quantization, layers: Iterable[tuple[int, int]]
) -> Iterator[TargetModule]:
    """The linears of transformer layers. `layers`: (number in the target, number in the model).

    Raises `ExportError` for one whose parts are quantised differently.
    """
    config = quantization.logical.config
    weights = [r for r in rules if r.scope is Scope.LAYER and r.target.endswith(".weight") and r.when(config)]
    for local, layer in layers:
        for rule in weights:
            if not rule.layers(config, layer):
                continue
            experts = range(config.num_experts) if "{expert}" in rule.inputs[0].logical else (-1,)
            name = rule.target.removesuffix(".weight").replace("{layer}", str(local))
            if rule.over_experts:
                yield from _module(quantization, name, rule, layer, experts)
                continue
            for expert in experts:
                yield from _module(quantization, name.replace("{expert}", str(expert)), rule, layer, (expert,))


def _module(
    quantization: Quantization, name: str, rule: TargetRule, layer: int, experts: Iterable[int]
) -> Iterator[TargetModule]:
    """One linear, or nothing where the rule's tensor is of no linear."""
    modules = {
        module
        for expert in experts
        for part in rule.inputs
        if (module := quantization.module_of(part.logical, layer=layer, expert=expert)) is not None
        and is_linear(module.pattern)
    }
    kinds = {kind_of(quantization, module) for module in modules}
    if len(kinds) > 1:
        listed = ", ".join(sorted(scheme.value for scheme, _ in kinds))
        raise ExportError(f"{name}: its parts are quantised differently: {listed}")
    if kinds:
        yield TargetModule(name, kinds.pop(), rule.over_experts)


def kind_of(quantization: Quantization, module: ModuleName) -> Kind:
    """How a module is quantised."""
    scheme: LinearScheme | None = quantization.schemes.get(module)
    return PLAIN if scheme is None else (scheme.scheme, scheme.group_size)
