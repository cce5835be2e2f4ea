"""Scales of activations that training or calibration left: of the linears' inputs and of the KV cache."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping

from msgspec import Struct, field
from msgspec.structs import replace

from dist_export.checkpoint.modelopt_state import ModeloptScheme
from dist_export.checkpoint.quantizer_names import ModuleName, Quantity, Quantizer
from dist_export.checkpoint.quantizer_scheme import KvScheme
from dist_export.checkpoint.te_states import Activation, Problem, TeScales
from dist_export.errors import ExportError, Faults
from dist_export.models.quantization import CORE_ATTENTION, LINEAR_QKV, Quantization, QuantizerTensors, kv_module

MOST_PATTERNS = 6
"""Spelled out in a hint."""


class InputScales(Struct):
    """Dequantisation scales of FP8 inputs out of TransformerEngine's states, exact."""

    scales: dict[ModuleName, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def te_input_scales(te: TeScales, tensors: QuantizerTensors, modules: Iterable[ModuleName]) -> InputScales:
    """The scale of every module's input that no stored amax (of a calibration file) gives.

    An expert that saw no token in training takes the largest scale of its layer's others: runtimes use the largest of
    all anyway. Raises one `ExportError` naming every module without a scale that can be used, and why.
    """
    result, missing = InputScales(), []
    for module in modules:
        if tensors.find(module, Quantizer.INPUT, Quantity.AMAX) is not None:
            continue
        found = te.scales.get((module, Activation.INPUT)) or te.scales.get((_of_all(module), Activation.INPUT))
        if found is not None:
            result.scales[module] = found.dequantise
        else:
            missing.append(module)
    left = _from_other_experts(te, result, missing)
    if left:
        raise ExportError(_without_scales(te, left, known=set(result.scales)))
    return result


def _of_all(module: ModuleName) -> ModuleName:
    """What stands for all experts of a layer."""
    return replace(module, expert=-1)


def _from_other_experts(te: TeScales, result: InputScales, missing: list[ModuleName]) -> list[ModuleName]:
    """Fill in experts that were never called; returns the modules that are left without a scale."""
    never = {fault.module for fault in te.faults_of(Problem.UNCALIBRATED)}
    largest: dict[ModuleName, float] = defaultdict(float)
    for module, scale in result.scales.items():
        largest[_of_all(module)] = max(largest[_of_all(module)], scale)
    left, filled = [], defaultdict[ModuleName, list[int]](list)
    for module in missing:
        if module.expert >= 0 and module in never and _of_all(module) in largest:
            result.scales[module] = largest[_of_all(module)]
            filled[_of_all(module)].append(module.expert)
        else:
            left.append(module)
    for module, experts in filled.items():
        listed = ", ".join(map(str, experts[:8])) + (", …" if len(experts) > 8 else "")
        result.notes.append(f"{module}: experts {listed} saw no token in training and share the others' input scale")
    return left


def _without_scales(te: TeScales, modules: list[ModuleName], known: set[ModuleName]) -> str:
    """Every module without a scale, why, and what can be done."""
    faults = Faults("FP8 needs a scale of every linear's input")
    broken = {fault.module: fault.message for fault in te.faults}
    told: dict[str, None] = {}
    for module in modules:
        own = broken.get(module) or te.without.get(module)
        of_all = broken.get(_of_all(module)) or te.without.get(_of_all(module))
        if own is None and of_all is not None:
            told[f"{_of_all(module)}: {_reason(of_all)}"] = None
        else:
            told[f"{module}: {_reason(own) if own else 'the checkpoint has no state of it'}"] = None
    faults.extend(told)
    if not known and not te.faults:
        recipes = f" (it was trained with {', '.join(sorted(te.recipes))})" if te.recipes else ""
        return (
            f"{faults}\n  the checkpoint has no scales of activations{recipes}: give --calibration FILE with their "
            "amax, or --quantization fp8_per_channel, whose activation scales are found while serving"
        )
    return f"{faults}\n  {_hint(modules, known)}"


def _reason(text: str) -> str:
    """Why a state has no scales, for people."""
    states = ("None", "pickled None", "empty tensor", "no scales in it")
    return f"it did not run in FP8 (its state: {text})" if text in states or text.startswith("recipe ") else text


def _hint(modules: list[ModuleName], known: set[ModuleName]) -> str:
    """Which patterns leave exactly these modules out, as far as they are few."""
    layers = {module.layer for module in modules} - {module.layer for module in known}
    patterns = [f"'decoder.layers.{layer}.*'" for layer in sorted(layers)]
    patterns += [f"'{module}'" for module in modules if module.layer not in layers]
    shown = " ".join(f"--exclude {each}" for each in patterns[:MOST_PATTERNS])
    shown += f" and {len(patterns) - MOST_PATTERNS} more" if len(patterns) > MOST_PATTERNS else ""
    return f"export them in the export's own element type with {shown}; or give --calibration FILE with their amax"


def kv_cache_scheme(modelopt: ModeloptScheme | None, num_layers: int, asked: str, scale: float | None) -> KvScheme:
    """How keys and values are stored: as asked (``auto``: as ModelOpt has it; FP8 where a scale is given).

    Raises `ExportError` for contradictions.
    """
    if scale is not None and (asked == "none" or not (math.isfinite(scale) and scale > 0)):
        raise ExportError(f"--kv-cache-scale {scale:g}: expected a positive number, and a KV cache that is quantised")
    if asked != "auto":
        return KvScheme[asked.upper()]
    if scale is not None:
        return KvScheme.FP8
    if modelopt is None:
        return KvScheme.NONE
    found = {
        modelopt.kv_cache(ModuleName(CORE_ATTENTION, layer), ModuleName(LINEAR_QKV, layer))
        for layer in range(num_layers)
    }
    if len(found) > 1:
        raise ExportError("layers differ in how their KV cache is quantised; choose with --kv-cache")
    return found.pop()


def te_kv_scales(te: TeScales, layer: int) -> Mapping[ModuleName, float]:
    """Of a layer's keys and values, from FP8 attention in training (``fp8_dpa``): one for query, key and value."""
    for name in (CORE_ATTENTION, f"{CORE_ATTENTION}.fused_attention"):
        found = te.scales.get((ModuleName(name, layer), Activation.QKV))
        if found is not None:
            return {kv_module(layer, part): found.dequantise for part in ("key", "value")}
    return {}


def with_kv_cache(found: Quantization, te: TeScales, scheme: KvScheme, scale: float | None) -> Quantization:
    """`found` with the KV cache's scheme and scales. `ExportError` naming every layer that has none."""
    if scheme not in (KvScheme.FP8, KvScheme.INT8):
        raise ExportError(f"a KV cache in {scheme.value} cannot be exported; give --kv-cache fp8 or --kv-cache none")
    scales, faults = dict(found.input_scales), Faults(f"KV cache in {scheme.value}")
    for layer in range(found.logical.config.num_layers) if scale is None else ():
        if all(each is not None for each in found.kv_amax(layer)):
            continue
        trained = te_kv_scales(te, layer) if scheme is KvScheme.FP8 else {}
        if not trained:
            faults.add(
                f"layer {layer}: neither the checkpoint nor a calibration file has the amax of its keys and values; "
                "give --kv-cache-scale, or --kv-cache none"
            )
        scales |= trained
    faults.raise_if_any()
    return replace(found, kv_cache=scheme, kv_cache_scale=scale, input_scales=scales)
