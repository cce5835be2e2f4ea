"""Which linears an export quantises and whose scales it takes: from the checkpoint's states and what the user asks."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from typing import TYPE_CHECKING

from msgspec import Struct
from msgspec.structs import asdict, replace

from dist_export.checkpoint.modelopt_files import read_modelopt_files, tells_of_modelopt
from dist_export.checkpoint.open import Checkpoint
from dist_export.checkpoint.quantizer_names import ModuleName, Quantity, Quantizer
from dist_export.checkpoint.quantizer_scheme import KvScheme, LinearScheme, Scheme
from dist_export.errors import ExportError, Faults
from dist_export.models.logical import LogicalModel
from dist_export.models.quantization import (
    STATIC_INPUT,
    SUPPORTED,
    WEIGHT_NAMES,
    Quantization,
    QuantizerTensors,
    is_linear,
)

if TYPE_CHECKING:
    from dist_export.checkpoint.modelopt_state import ModeloptScheme
    from dist_export.checkpoint.te_states import TeScales

AUTO, NONE = "auto", "none"
ASKED: Mapping[str, Scheme] = {
    "fp8": Scheme.FP8,
    "fp8_per_channel": Scheme.FP8_PER_CHANNEL_PER_TOKEN,
    "nvfp4": Scheme.NVFP4,
    "int8_sq": Scheme.INT8_SQ,
    "int4_awq": Scheme.INT4_AWQ,
    "int8_wo": Scheme.INT8_WO,
    "int4_wo": Scheme.INT4_WO,
}
"""What ``--quantization`` may ask of a checkpoint that is not quantised."""
GROUP_SIZES: Mapping[Scheme, int] = {Scheme.NVFP4: 16, Scheme.INT4_AWQ: 128}
"""Columns that share a scale."""
SMOOTHED = (Scheme.INT8_SQ, Scheme.INT4_AWQ)
"""Schemes that move part of the activations' range into the weights, by a factor that calibration finds."""


class QuantizationOptions(Struct, frozen=True, kw_only=True):
    """What the user chooses."""

    algorithm: str = AUTO
    """``auto``: as ModelOpt quantised the checkpoint, if it did; ``none``; or one of `ASKED`."""
    exclude: tuple[str, ...] = ()
    """Patterns (fnmatch) of Megatron modules that keep their element type."""
    kv_cache: str = AUTO
    """``auto``: as the checkpoint says; ``none``, ``fp8``, ``int8``."""
    kv_cache_scale: float | None = None
    """Of every layer, instead of the checkpoint's."""
    te_version: str | None = None
    """TransformerEngine's release in training, ``2.1``, where the states of grouped experts do not tell."""

    @property
    def te_release(self) -> tuple[int, int] | None:
        """`te_version` as numbers. Raises `ExportError`."""
        match = re.match(r"v?(\d+)\.(\d+)", self.te_version) if self.te_version is not None else None
        if self.te_version is not None and match is None:
            raise ExportError(f"--te-version {self.te_version}: expected a release like 2.1")
        return (int(match[1]), int(match[2])) if match else None

    @classmethod
    def from_plain(cls, values: Mapping[str, object]) -> QuantizationOptions:
        """Options out of a manifest."""
        exclude = values.get("exclude", ())
        assert isinstance(exclude, list | tuple)
        return cls(**{**values, "exclude": tuple(exclude)})  # type: ignore[arg-type]


class States(Struct, frozen=True):
    """What a checkpoint says of its quantisation."""

    modelopt: ModeloptScheme | None = None
    te: TeScales | None = None
    """None where nothing asked for them."""


def read_quantiser_states(checkpoint: Checkpoint, tensors: QuantizerTensors, options: QuantizationOptions) -> States:
    """Read the layers' states and ModelOpt's files. `ExportError` for what cannot be read.

    The layers' states are not opened for an export that nothing asks to quantise: no option, no quantiser's tensor, no
    file of ModelOpt, nor its name in a few of the states. Every layer has one, and TransformerEngine writes them in
    training of any kind.
    """
    saved = read_modelopt_files(checkpoint.index)
    quantised = saved is not None or bool(tensors.names) or tells_of_modelopt(checkpoint.index)
    if not quantised and options == replace(QuantizationOptions(), exclude=options.exclude):
        return States()
    # Imported here, since most exports quantise nothing.
    from dist_export.checkpoint.extra_state_records import read_states
    from dist_export.checkpoint.modelopt_state import modelopt_scheme_of
    from dist_export.checkpoint.te_states import ExpertGroups, te_scales_of

    states = list(read_states(checkpoint.index))
    groups = ExpertGroups.of_arguments(checkpoint.arguments)
    te = te_scales_of(states, **asdict(groups), te_version=options.te_release)
    return States(modelopt_scheme_of(saved, states, origin=str(checkpoint.index.folder)), te)


def decide(
    states: States, tensors: QuantizerTensors, logical: LogicalModel, options: QuantizationOptions
) -> Quantization | None:
    """How the export quantises, None when it does not.

    Raises `ExportError` for a quantised checkpoint whose weights cannot be taken as they are, for schemes that cannot
    be exported, and for activations without a scale.
    """
    if states.te is None and not options.exclude:  # nothing asks for it
        return None
    modules = _included(logical, options.exclude)
    if states.te is None:
        return None
    from dist_export.activation_scales import kv_cache_scheme, with_kv_cache

    if options.algorithm == NONE:
        _refuse_smoothed(tensors)
        found = None
    elif options.algorithm != AUTO:
        found = _asked(states, tensors, logical, options, modules)
    elif states.modelopt is not None:
        found = _as_calibrated(states.modelopt, tensors, logical, options, modules)
    else:
        _refuse_unexplained(tensors)
        found = None
    kv_cache = kv_cache_scheme(states.modelopt, logical.config.num_layers, options.kv_cache, options.kv_cache_scale)
    if kv_cache is KvScheme.NONE:
        return found
    found = found or Quantization({}, logical, tensors, f"KV cache in {kv_cache.value}")
    return with_kv_cache(found, states.te, kv_cache, options.kv_cache_scale)


def _included(logical: LogicalModel, patterns: tuple[str, ...]) -> list[ModuleName]:
    """The linears that no pattern leaves out. `ExportError` for patterns that match none."""
    modules = list(linear_modules(logical))
    unused = [each for each in patterns if not any(fnmatch(str(name), each) for name in modules)]
    if unused:
        example = f", like {modules[0]}" if modules else ""
        raise ExportError(f"--exclude {unused[0]}: matches no linear of a transformer layer{example}")
    return [name for name in modules if not _excluded(name, patterns)]


def _as_calibrated(
    modelopt: ModeloptScheme,
    tensors: QuantizerTensors,
    logical: LogicalModel,
    options: QuantizationOptions,
    modules: list[ModuleName],
) -> Quantization | None:
    """As ModelOpt has quantised the model."""
    _refuse_smoothing(tensors, "ModelOpt has quantised this checkpoint, and its weights are stored as they are served")
    named = modelopt.linears(linear_modules(logical))
    left_out = set(named) - set(modules)
    faults = Faults("--exclude: the weight is stored smoothed or quantised, and means nothing without its scales")
    faults.extend(str(name) for name in named if name in left_out and _is_changed(tensors, name, named[name]))
    faults.raise_if_any()
    schemes = {name: named[name] for name in modules if named[name].scheme is not Scheme.NONE}
    _refuse_unknown(schemes)
    origin = f"ModelOpt {modelopt.version} ({modelopt.algorithm or 'calibrated'})".replace("  ", " ")
    return Quantization(schemes, logical, tensors, origin) if schemes else None


def _is_changed(tensors: QuantizerTensors, name: ModuleName, scheme: LinearScheme) -> bool:
    factor = tensors.find(name, Quantizer.INPUT, Quantity.PRE_QUANT_SCALE)
    return scheme.scheme is not Scheme.NONE and (scheme.compressed or factor is not None)


def linear_modules(logical: LogicalModel) -> Iterator[ModuleName]:
    """The modules of the transformer layers whose weights may be quantised, in order: not router, embedding, head."""
    config = logical.config
    patterns = [rule.source for rule in logical.rules if _is_linear(rule.source) and rule.when(config)]
    for pattern in dict.fromkeys(name.rpartition(".")[0] for name in patterns):
        experts = range(config.num_experts) if "{expert}" in pattern else (-1,)
        sources = [name for name in patterns if name.rpartition(".")[0] == pattern]
        for layer in range(config.num_layers):
            for expert in experts:
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
    """As the user asks, of a checkpoint that is not quantised."""
    scheme = ASKED[options.algorithm]
    if states.modelopt is not None and states.modelopt.overall(linear_modules(logical)) is not Scheme.NONE:
        raise ExportError(
            f"--quantization {options.algorithm}: ModelOpt has quantised this checkpoint; leave the option out to "
            "export it as it was calibrated"
        )
    _refuse_smoothed(tensors)
    if not modules:
        raise ExportError(f"--quantization {options.algorithm}: --exclude leaves no linear of the model")
    schemes = {name: LinearScheme(scheme, group_size=GROUP_SIZES.get(scheme)) for name in modules}
    if scheme in SMOOTHED:
        _require_smoothing(tensors, modules, options.algorithm)
    else:
        _refuse_smoothing(tensors, f"--quantization {options.algorithm} leaves weights as they are")
    from dist_export.activation_scales import InputScales, te_input_scales

    inputs = InputScales()
    if scheme is Scheme.FP8:
        assert states.te is not None, "the states are read where a scheme is asked for"
        inputs = te_input_scales(states.te, tensors, modules)
    elif scheme in STATIC_INPUT:
        _require_amax(tensors, modules, options.algorithm)
    origin = f"--quantization {options.algorithm}"
    return Quantization(schemes, logical, tensors, origin, inputs.scales, notes=tuple(inputs.notes))


def _refuse_smoothing(tensors: QuantizerTensors, why: str) -> None:
    found = [name for name in tensors.catalog.patterns() if name.endswith(Quantity.SMOOTHING.value)]
    if found:
        raise ExportError(
            f"--calibration: {why}, but the file says how to smooth them ({found[0]} and {len(found) - 1} more): it "
            "was made for another scheme"
        )


def _require_smoothing(tensors: QuantizerTensors, modules: list[ModuleName], asked: str) -> None:
    """`ExportError` naming every module of which the factor, or the amax of the smoothed weight, is not known."""
    needed = (
        (Quantizer.INPUT, Quantity.PRE_QUANT_SCALE),
        (Quantizer.INPUT, Quantity.SMOOTHING),
        (Quantizer.WEIGHT, Quantity.AMAX),
    )
    faults = Faults(
        f"--quantization {asked} needs what smooths every linear; give --calibration FILE, "
        f"as `dist-export calibrate --scheme {asked}` writes it"
    )
    for name in modules:
        missing = [f"{a.value}.{b.value}" for a, b in needed if tensors.find(name, a, b) is None]
        if missing:
            faults.add(f"{name}: {', '.join(missing)}")
    faults.raise_if_any()


def _require_amax(tensors: QuantizerTensors, modules: list[ModuleName], asked: str) -> None:
    """`ExportError` naming every module of whose input no amax is known."""
    faults = Faults(f"--quantization {asked} needs the amax of every linear's input; give --calibration FILE with them")
    faults.extend(str(name) for name in modules if tensors.find(name, Quantizer.INPUT, Quantity.AMAX) is None)
    faults.raise_if_any()


def _refuse_unexplained(tensors: QuantizerTensors) -> None:
    """Quantisers' tensors that no state explains."""
    patterns = list(tensors.catalog.patterns())
    if any(not name.endswith(("_bmm_quantizer._amax", ".output_quantizer._amax")) for name in patterns):
        raise ExportError(
            "the checkpoint has quantiser tensors but no state that tells how it is quantised (modelopt_state/ beside "
            "the records); give --quantization, or --quantization none to export the weights as they are"
        )


def _refuse_smoothed(tensors: QuantizerTensors) -> None:
    """Weights that are stored smoothed; not those that a calibration file says how to smooth."""
    patterns = set(tensors.catalog.patterns())
    factor, smoothing = Quantity.PRE_QUANT_SCALE.value, Quantity.SMOOTHING.value
    bad = [name for name in sorted(patterns) if name.endswith((factor, f".{Quantity.SCALE.value}"))]
    bad = [name for name in bad if name.removesuffix(factor) + smoothing not in patterns]
    if bad:
        raise ExportError(
            f"the weights are stored smoothed or quantised ({bad[0]} and {len(bad) - 1} more): they mean nothing "
            "without their scales. Leave --quantization out to export them as they were calibrated"
        )


def _refuse_unknown(schemes: Mapping[ModuleName, LinearScheme]) -> None:
    faults = Faults("quantisation that cannot be exported")
    for name, each in schemes.items():
        if each.scheme not in SUPPORTED:
            faults.add(f"{name}: {each.scheme.value}")
    faults.raise_if_any()
