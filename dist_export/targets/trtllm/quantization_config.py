"""What config.json and quant_cfg.json say of quantised linears, and which releases read it.

Sources, releases 0.14 and 1.x: tensorrt_llm/models/modeling_utils.py (``QuantConfig``, ``LayerQuantConfig``,
``preprocess_weights``), tensorrt_llm/quantization/quantize.py (``quantize_layers``, ``fp8_rowwise_quantize``) and
quantization/mode.py (``QuantAlgo``). Modules are named as the loader's ``named_modules`` has them: layers are numbered
within a pipeline stage.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from msgspec import Struct, field

from dist_export.checkpoint.quantizer_names import ModuleName
from dist_export.checkpoint.quantizer_scheme import KvScheme, Scheme
from dist_export.errors import ExportError, Faults
from dist_export.models.quantization import LINEAR_QKV, WEIGHT_NAMES, WEIGHT_ONLY, Quantization
from dist_export.models.rules import TargetRule
from dist_export.plan.layout import TargetLayout
from dist_export.plan.quantize import FP4
from dist_export.plan.target_modules import PLAIN, Kind, TargetModule, kind_of, target_modules
from dist_export.targets.trtllm.quantization import NAMES
from dist_export.targets.trtllm.releases import ALL, RELEASES, Span, described

QUANT_CFG = "quant_cfg.json"

KNOWN: Mapping[Scheme, Span] = {
    Scheme.NVFP4: Span("0.17"),
    Scheme.FP8_PER_CHANNEL_PER_TOKEN: Span("0.14"),
    Scheme.MIXED: Span("0.14"),
}
"""Schemes that not every release has."""
BROKEN: Mapping[Scheme, tuple[str, ...]] = {Scheme.MIXED: ("1.0",)}
"""Releases that have a scheme and fail on it: 1.0 calls the module ``fnmatch`` (``LayerQuantConfig``)."""

NO_EXPERTS: Mapping[Scheme, str] = {
    Scheme.INT8_SQ: "no release has experts in it",
    Scheme.FP8_PER_CHANNEL_PER_TOKEN: "no release has experts in it",
    Scheme.INT4_AWQ: "up to 0.17 the loader fails on it, and later ones take one factor for all experts of a layer",
    Scheme.W4A8_AWQ: "up to 0.17 the loader fails on it, and later ones take one factor for all experts of a layer",
    Scheme.MIXED: "experts cannot be named there",
}
LOADERS_OWN = (
    *("*lm_head", "*router", "*vocab_embedding", "*position_embedding", "*block_embedding"),
    "*shared_expert_gate",
)
"""What the loader leaves out where config.json has no list; a list there replaces it."""
CLAMP = [-1200.0, 1200.0]
"""0.14's norms for FP8 rows read bounds unconditionally; these are those of Meta's recipe."""


class QuantizationConfig(Struct, frozen=True):
    """The quantisation of an export as the engine's configuration has it."""

    table: dict[str, object]
    """``quantization`` of config.json."""
    releases: tuple[str, ...]
    documents: dict[str, object] = field(default_factory=dict)
    """Other files by name."""


def quantization_config(
    quantization: Quantization, rules: Sequence[TargetRule], layout: TargetLayout, releases: tuple[str, ...]
) -> QuantizationConfig:
    """What to write, and those of `releases` that read it.

    Raises `ExportError` where none does, or where the names of modules cannot say which ones are quantised.
    """
    _check_known(quantization)
    modules = _modules(quantization, rules, layout)
    kinds = {module.kind for module in modules} - {PLAIN}
    overall = Scheme.NONE if not kinds else Scheme.MIXED if len(kinds) > 1 else next(iter(kinds))[0]
    _check_experts(quantization, modules, overall)
    _check_sizes(quantization, layout.tp_size)
    valid = _valid_releases((overall, *sorted({scheme for scheme, _ in kinds}, key=str)), releases)
    kv_cache = None if quantization.kv_cache is KvScheme.NONE else quantization.kv_cache.value
    table: dict[str, object] = {"quant_algo": None, "kv_cache_quant_algo": kv_cache}
    if overall is Scheme.NONE:
        return QuantizationConfig(table, valid)
    if overall is Scheme.MIXED:
        table["quant_algo"] = overall.value
        named = _by_name(modules, layout)
        layers = {name: _algorithm(module.kind) for name, module in named.items() if module.kind != PLAIN}
        return QuantizationConfig(table, valid, {QUANT_CFG: {**table, "quantized_layers": layers}})
    table |= _algorithm(kinds.pop())
    if overall is Scheme.FP8_PER_CHANNEL_PER_TOKEN:
        return _rowwise(quantization, modules, layout, table, valid)
    excluded = _excluded(_by_name(modules, layout))
    if overall not in WEIGHT_ONLY:
        table["exclude_modules"] = [*_never_quantized(quantization, rules), *excluded]
        return QuantizationConfig(table, valid)
    if excluded:  # matched against names of modules and of weights
        weights = (f"{name}.weight" for name in (*excluded, "*shared_expert_gate"))
        table["exclude_modules"] = [*LOADERS_OWN, *excluded, *weights]
    return QuantizationConfig(table, valid)


def _check_known(quantization: Quantization) -> None:
    """Raise `ExportError` for schemes that no engine has."""
    unknown = sorted({each.scheme.value for each in quantization.schemes.values() if each.scheme not in NAMES})
    if unknown:
        raise ExportError(
            f"TensorRT-LLM's engine builder has no {', '.join(unknown)}: export the model with --target hf"
        )


def _modules(quantization: Quantization, rules: Sequence[TargetRule], layout: TargetLayout) -> list[TargetModule]:
    """The linears of all stages."""
    stages = (enumerate(layout.layers(stage * layout.tp_size)) for stage in range(layout.pp_size))
    return [module for layers in stages for module in target_modules(rules, quantization, layers)]


def _by_name(modules: Iterable[TargetModule], layout: TargetLayout) -> dict[str, TargetModule]:
    """Raises `ExportError` where one name means different things in different stages."""
    found: dict[str, TargetModule] = {}
    for module in modules:
        if found.setdefault(module.name, module).kind != module.kind:
            raise ExportError(
                f"pp {layout.pp_size}: TensorRT-LLM numbers layers within a pipeline stage, so {module.name} names a "
                "layer of every stage, and these are not quantised alike; export with pp 1, or quantise them alike"
            )
    return found


def _excluded(modules: Mapping[str, TargetModule]) -> list[str]:
    """Linears that keep their element type. Experts are one module of the engine, quantised as a whole."""
    names = [m.name.rpartition(".")[0] if m.over_experts else m.name for m in modules.values() if m.kind == PLAIN]
    return list(dict.fromkeys(names))


def _never_quantized(quantization: Quantization, rules: Sequence[TargetRule]) -> list[str]:
    """What the loader's own list has and a list of ours must repeat."""
    config = quantization.logical.config
    routers = range(config.num_layers) if config.num_experts else ()
    names = ["lm_head", *(f"transformer.layers.{layer}.mlp.router" for layer in routers)]
    has_gate = any(rule.target.endswith("shared_expert_gate.weight") and rule.when(config) for rule in rules)
    return [*names, *(("*shared_expert_gate",) if has_gate else ())]


def _algorithm(kind: Kind) -> dict[str, object]:
    scheme, size = kind
    table: dict[str, object] = {"quant_algo": scheme.value}
    if scheme in FP4:
        table["group_size"] = 16
    if scheme in (Scheme.INT4_AWQ, Scheme.W4A8_AWQ):
        table |= {"group_size": size or 128, "has_zero_point": False, "pre_quant_scale": True}
    return table


def _check_experts(quantization: Quantization, modules: Sequence[TargetModule], overall: Scheme) -> None:
    """Raise `ExportError` for quantised experts that no release's model class has."""
    experts = [module for module in modules if module.over_experts]
    if overall in NO_EXPERTS and any(each.kind != PLAIN for each in experts):
        raise ExportError(f"experts in {overall.value} cannot be exported: {NO_EXPERTS[overall]}")
    plain = {each.name.rpartition(".")[0] for each in experts if each.kind == PLAIN}
    halves = sorted(plain & {each.name.rpartition(".")[0] for each in experts if each.kind != PLAIN})
    if halves:
        raise ExportError(f"{halves[0]}: fc1 and fc2 of experts must be quantised alike, or both left out")
    if quantization.logical.config.num_experts and overall is Scheme.FP8_PER_CHANNEL_PER_TOKEN:
        raise ExportError(f"a model with experts in {overall.value} cannot be exported: {NO_EXPERTS[overall]}")


def _valid_releases(schemes: Iterable[Scheme], releases: tuple[str, ...]) -> tuple[str, ...]:
    """Those of `releases` that have all schemes; `ExportError` where there are none."""
    for scheme in schemes:
        span, broken, asked = KNOWN.get(scheme, ALL), BROKEN.get(scheme, ()), releases
        releases = tuple(each for each in asked if each in span and each not in broken)
        if not releases:
            but = f" (not {', '.join(broken)})" if broken else ""
            raise ExportError(f"{scheme.value} is in TensorRT-LLM {span}{but}, not in {described(asked)}")
    return releases


SIZES = {Scheme.INT8_WO: 64, Scheme.INT4_WO: 64, Scheme.INT4_AWQ: 64, Scheme.W4A8_AWQ: 128}
"""What both sides of a linear are rounded up to, times tp, and to whole groups (quantization/layers.py)."""


def _padded(quantization: Quantization, tp_size: int) -> Iterator[tuple[Scheme, str]]:
    """Linears whose sizes the loader's kernels do not take: the modules round both sides up, but not the weights."""
    for module in quantization.modules():
        scheme, group_size = kind_of(quantization, module)
        shape = _engine_shape(quantization, module, tp_size)
        if scheme in SIZES and shape is not None:
            multiple = max(SIZES[scheme], group_size or 0) * tp_size
            if any(size % multiple for size in shape):
                yield scheme, f"{module} {list(shape)}: {scheme.value} needs sizes that are multiples of {multiple}"


def _check_sizes(quantization: Quantization, tp_size: int) -> None:
    """Raise one `ExportError` for all weight-only linears that cannot be loaded for their sizes."""
    faults = Faults(f"TensorRT-LLM at tp {tp_size} pads these linears, but not their weights")
    faults.extend(text for scheme, text in _padded(quantization, tp_size) if scheme in WEIGHT_ONLY)
    faults.raise_if_any()


def _engine_shape(quantization: Quantization, module: ModuleName, tp_size: int) -> tuple[int, int] | None:
    """Rows and columns of a linear as the engine has it: gate and up apart, key/value heads repeated for the ranks."""
    logical = quantization.logical
    config = logical.config
    for name in WEIGHT_NAMES:
        weight = logical.catalog.find(f"{module.pattern}.{name}", layer=module.layer, expert=module.expert)
        if weight is None:
            continue
        rows, columns = weight.shape
        if module.pattern.endswith("linear_fc1") and config.gated and name == "weight":
            rows //= 2
        if module.pattern == LINEAR_QKV:
            rows += 2 * config.head_size * max(tp_size - config.num_query_groups, 0)
        return rows, columns
    return None


def notes_of(quantization: Quantization, tp_size: int, releases: Sequence[str]) -> tuple[str, ...]:
    """What the user should know of how releases take the scales."""
    notes = list(quantization.notes)
    padded = [text for scheme, text in _padded(quantization, tp_size) if scheme not in WEIGHT_ONLY]
    if padded:  # as ModelOpt writes them, too; seen in 0.14
        notes.append(f"TensorRT-LLM 0.14 cannot load {len(padded)} linears at tp {tp_size}: {padded[0]}")
    if quantization.kv_cache is KvScheme.FP8 and {"0.12", "0.13"} & {*releases}:
        notes.append("TensorRT-LLM 0.12 and 0.13 scale an FP8 KV cache by 1.0, whatever the checkpoint says")
    if quantization.kv_cache_scale is not None:
        notes.append(f"the KV cache's scale {quantization.kv_cache_scale:g} was given, not calibrated")
    return tuple(notes)


_SPARED_BY_META = "TensorRT-LLM 0.14 has {scheme} in the MLPs of layers that are neither first nor last, nowhere else"


def _rowwise(
    quantization: Quantization,
    modules: Sequence[TargetModule],
    layout: TargetLayout,
    table: dict[str, object],
    releases: tuple[str, ...],
) -> QuantizationConfig:
    """FP8 by rows: whole attentions and whole MLPs are quantised, each with the norm in front of it."""
    last = quantization.logical.config.num_layers - 1
    spared = {m for m in quantization.schemes if m.layer in (0, last) or ".mlp." not in m.pattern}
    is_meta = last > 1 and not spared and len(quantization.schemes) == 2 * (last - 1)
    if releases == ("0.14",):
        if not is_meta:
            raise ExportError(
                f"{_SPARED_BY_META.format(scheme=table['quant_algo'])}: leave the rest out with "
                f"--exclude 'decoder.layers.*.self_attention.*' --exclude 'decoder.layers.0.*' "
                f"--exclude 'decoder.layers.{last}.*', or export for a later release"
            )
        return QuantizationConfig({**table, "clamp_val": CLAMP}, releases)
    later = tuple(each for each in releases if RELEASES.index(each) >= RELEASES.index("0.15"))
    if quantization.logical.config.normalization == "LayerNorm":
        later = tuple(each for each in later if RELEASES.index(each) >= RELEASES.index("1.0"))
    if not later:
        raise ExportError(f"{table['quant_algo']} of a model with LayerNorm is in TensorRT-LLM from 1.0 on")
    if is_meta:
        return QuantizationConfig({**table, "use_meta_recipe": True, "clamp_val": CLAMP}, later)
    blocks: dict[str, set[bool]] = {}
    for module in _by_name(modules, layout).values():
        blocks.setdefault(module.name.rpartition(".")[0], set()).add(module.kind != PLAIN)
    torn = [name for name, states in blocks.items() if len(states) > 1]
    if torn:
        scheme = table["quant_algo"]
        raise ExportError(f"{torn[0]}: all linears of an attention or an MLP are {scheme}, or none; see --exclude")
    names = [name for name, states in blocks.items() if states == {False}]
    norms = {"attention": "input_layernorm", "mlp": "post_layernorm"}
    names += [f"{head}.{norms[block]}" for head, _, block in (name.rpartition(".") for name in names)]
    table["exclude_modules"] = ["lm_head", "*ln_f", "*ln_embed", *names]
    return QuantizationConfig(table, later)
