"""Which linears an export quantises and whose scales it takes: from the checkpoint's states and what the user asks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatch

from dist_export.checkpoint.extra_state_records import read_states
from dist_export.checkpoint.modelopt_files import read_modelopt_files
from dist_export.checkpoint.modelopt_state import ModeloptScheme, modelopt_scheme_of
from dist_export.checkpoint.open import Checkpoint
from dist_export.checkpoint.quantizer_names import ModuleName, Quantity, Quantizer
from dist_export.checkpoint.quantizer_scheme import KvScheme, LinearScheme, Scheme
from dist_export.checkpoint.te_states import Activation, TeScales, te_scales_of
from dist_export.errors import ExportError, Faults
from dist_export.models.config import ModelConfig
from dist_export.models.logical import LogicalModel
from dist_export.models.quantization import (
    STATIC_INPUT,
    SUPPORTED,
    WEIGHT_NAMES,
    Quantization,
    QuantizerTensors,
    is_linear,
)

AUTO, NONE = "auto", "none"
ASKED: Mapping[str, Scheme] = {
    "fp8": Scheme.FP8,
    "nvfp4": Scheme.NVFP4,
    "int8_wo": Scheme.INT8_WO,
    "int4_wo": Scheme.INT4_WO,
}
"""What ``--quantization`` may ask of a checkpoint that is not quantised."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizationOptions:
    """What the user chooses."""

    algorithm: str = AUTO
    """``auto``: as ModelOpt quantised the checkpoint, if it did; ``none``; or one of `ASKED`."""
    exclude: tuple[str, ...] = ()
    """Patterns (fnmatch) of Megatron modules that keep their element type."""
    kv_cache: str = AUTO
    """``auto``: as the checkpoint says; ``none``, ``fp8``, ``int8``."""
    kv_cache_scale: float | None = None
    """Of every layer, instead of the checkpoint's."""

    @classmethod
    def from_plain(cls, values: Mapping[str, object]) -> QuantizationOptions:
        """Options out of a manifest."""
        exclude = values.get("exclude", ())
        assert isinstance(exclude, list | tuple)
        return cls(**{**values, "exclude": tuple(exclude)})  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class States:
    """What a checkpoint says of its quantisation."""

    modelopt: ModeloptScheme | None
    te: TeScales


def read_quantiser_states(checkpoint: Checkpoint) -> States:
    """Read the layers' states and ModelOpt's files. `ExportError` for what cannot be read."""
    arguments = checkpoint.arguments or {}
    states = list(read_states(checkpoint.index))
    experts, ranks = arguments.get("num_experts"), arguments.get("expert_model_parallel_size")
    local = experts // ranks if isinstance(experts, int) and isinstance(ranks, int) and ranks > 0 else None
    te = te_scales_of(states, grouped_gemm=arguments.get("moe_grouped_gemm") is True, num_local_experts=local)
    saved = read_modelopt_files(checkpoint.index)
    return States(modelopt_scheme_of(saved, states, origin=str(checkpoint.index.folder)), te)


def decide(
    states: States, tensors: QuantizerTensors, logical: LogicalModel, options: QuantizationOptions
) -> Quantization | None:
    """How the export quantises, None when it does not.

    Raises `ExportError` for a quantised checkpoint whose weights cannot be taken as they are, for schemes that cannot
    be exported, and for activations without a scale.
    """
    modules = [name for name in linear_modules(logical) if not _excluded(name, options.exclude)]
    if options.algorithm == NONE:
        _refuse_smoothed(tensors)
        return None
    if options.algorithm != AUTO:
        return _asked(states, tensors, logical, options, modules)
    if states.modelopt is None:
        if any(True for _ in tensors.catalog.patterns()):
            raise ExportError(
                "the checkpoint has quantiser tensors but no state that tells how it is quantised (modelopt_state/ beside "
                "the records); give --quantization, or --quantization none to export the weights as they are"
            )
        return _with_kv_cache(None, states, tensors, logical, options)
    schemes = {name: each for name, each in states.modelopt.linears(modules).items() if each.scheme is not Scheme.NONE}
    _refuse_unknown(schemes)
    origin = f"ModelOpt {states.modelopt.version} ({states.modelopt.algorithm or 'calibrated'})".replace("  ", " ")
    found = Quantization(schemes, logical, tensors, origin) if schemes else None
    return _with_kv_cache(found, states, tensors, logical, options)


def linear_modules(logical: LogicalModel) -> Iterator[ModuleName]:
    """The modules of the transformer layers whose weights may be quantised, in order: not router, embedding, head."""
    config = logical.config
    patterns = [rule.source for rule in logical.rules if _is_linear(rule.source) and rule.when(config)]
    for pattern in dict.fromkeys(name.rpartition(".")[0] for name in patterns):
        experts = range(config.num_experts) if "{expert}" in pattern else (-1,)
        for layer in range(config.num_layers):
            for expert in experts:
                sources = [name for name in patterns if name.rpartition(".")[0] == pattern]
                if any(logical.catalog.find(source, layer=layer, expert=expert) for source in sources):
                    yield ModuleName(pattern, layer, expert)


def _is_linear(source: str) -> bool:
    module, _, last = source.rpartition(".")
    return is_linear(module) and last in WEIGHT_NAMES


def _excluded(name: ModuleName, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(str(name), pattern) for pattern in patterns)


def _asked(
    states: States,
    tensors: QuantizerTensors,
    logical: LogicalModel,
    options: QuantizationOptions,
    modules: list[ModuleName],
) -> Quantization:
    scheme = ASKED[options.algorithm]
    if states.modelopt is not None:
        raise ExportError(
            f"--quantization {options.algorithm}: ModelOpt has quantised this checkpoint; leave the option out to export "
            "it as it was calibrated"
        )
    _refuse_smoothed(tensors)
    size = 16 if scheme is Scheme.NVFP4 else None
    schemes = {name: LinearScheme(scheme, group_size=size) for name in modules}
    scales: dict[ModuleName, float] = {}
    if scheme in STATIC_INPUT:
        scales = _input_scales(states.te, tensors, modules, options)
    if scheme is not Scheme.FP8 and scales:
        raise ExportError(f"--quantization {options.algorithm}: TransformerEngine's scales are of FP8; give --calibration")
    found = Quantization(schemes, logical, tensors, f"--quantization {options.algorithm}", scales)
    with_kv = _with_kv_cache(found, states, tensors, logical, options)
    assert with_kv is not None
    return with_kv


def _input_scales(
    te: TeScales, tensors: QuantizerTensors, modules: list[ModuleName], options: QuantizationOptions
) -> dict[ModuleName, float]:
    """TransformerEngine's, of modules that no calibration file has an amax of. `ExportError` naming all without."""
    faults, scales = Faults(f"--quantization {options.algorithm}: activations without a scale"), {}
    broken = {fault.module: fault.message for fault in te.faults}
    for module in modules:
        if tensors.find(module, Quantizer.INPUT, Quantity.AMAX) is not None:
            continue
        found = te.scales.get((module, Activation.INPUT))
        if found is not None:
            scales[module] = found.dequantise
        else:
            why = broken.get(module) or te.without.get(module) or "the checkpoint has no state of it"
            faults.add(f"{module}: {why}")
    if faults:
        hint = "give --calibration FILE with their amax, or leave modules out with --exclude PATTERN"
        raise ExportError(f"{faults}\n  {hint}")
    return scales


def _refuse_smoothed(tensors: QuantizerTensors) -> None:
    bad = [name for name in tensors.catalog.patterns() if name.endswith(("_pre_quant_scale", "._scale"))]
    if bad:
        raise ExportError(
            f"the weights are stored smoothed or quantised ({bad[0]} and {len(bad) - 1} more): they mean nothing without "
            "their scales. Leave --quantization out to export them as they were calibrated"
        )


def _refuse_unknown(schemes: Mapping[ModuleName, LinearScheme]) -> None:
    faults = Faults("quantisation that cannot be exported")
    for name, each in schemes.items():
        if each.scheme not in SUPPORTED:
            faults.add(f"{name}: {each.scheme.value}")
        elif each.compressed:
            faults.add(f"{name}: its weight is stored quantised (mtq.compress); export the model before it is compressed")
    faults.raise_if_any()


def _with_kv_cache(
    found: Quantization | None,
    states: States,
    tensors: QuantizerTensors,
    logical: LogicalModel,
    options: QuantizationOptions,
) -> Quantization | None:
    scheme = _kv_scheme(states, logical.config, options)
    if scheme is KvScheme.NONE:
        return found
    if scheme not in (KvScheme.FP8, KvScheme.INT8):
        raise ExportError(f"a KV cache in {scheme.value} cannot be exported")
    found = found or Quantization({}, logical, tensors, f"KV cache in {scheme.value}")
    found = replace(found, kv_cache=scheme, kv_cache_scale=options.kv_cache_scale)
    faults = Faults(f"KV cache in {scheme.value}")
    if options.kv_cache_scale is None:
        for layer in range(logical.config.num_layers):
            if any(each is None for each in found.kv_amax(layer)):
                faults.add(
                    f"layer {layer}: neither the checkpoint nor a calibration file has the amax of its keys and values; "
                    "give --kv-cache-scale, or --kv-cache none"
                )
    faults.raise_if_any()
    return found


def _kv_scheme(states: States, config: ModelConfig, options: QuantizationOptions) -> KvScheme:
    if options.kv_cache != AUTO:
        return KvScheme[options.kv_cache.upper()]
    if options.kv_cache_scale is not None:
        return KvScheme.FP8
    if states.modelopt is None:
        return KvScheme.NONE
    found = set()
    for layer in range(config.num_layers):
        attention = "decoder.layers.{layer}.self_attention."
        names = (ModuleName(attention + each, layer) for each in ("core_attention", "linear_qkv"))
        found.add(states.modelopt.kv_cache(*names))
    if len(found) > 1:
        raise ExportError("layers differ in how their KV cache is quantised; choose with --kv-cache")
    return found.pop()
