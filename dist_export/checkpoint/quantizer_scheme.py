"""What ModelOpt's quantisers do to a linear, and the name of the scheme that makes of it.

Source: modelopt/torch/quantization/config.py and modelopt/torch/export/quant_utils.py (`get_quantization_format`,
`get_kv_cache_dtype`), releases 0.23 to 0.47.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import Enum
from typing import Any

from msgspec import Struct

from dist_export.errors import ExportError

NumBits = int | tuple[int, int]
"""Bits of an integer, or (exponent, mantissa) bits of a float."""
E4M3, E2M1, E8M0 = (4, 3), (2, 1), (8, 0)


class Scheme(Enum):
    """How the weight and the input of a linear are quantised."""

    NONE = "none"
    FP8 = "FP8"
    FP8_PER_CHANNEL_PER_TOKEN = "FP8_PER_CHANNEL_PER_TOKEN"
    FP8_BLOCK = "FP8_PB_WO"
    INT8_SQ = "W8A8_SQ_PER_CHANNEL"
    INT8_WO = "W8A16"
    INT4_WO = "W4A16"
    INT4_AWQ = "W4A16_AWQ"
    W4A8_AWQ = "W4A8_AWQ"
    NVFP4 = "NVFP4"
    NVFP4_AWQ = "NVFP4_AWQ"
    NVFP4_SVDQUANT = "NVFP4_SVDQUANT"
    W4A16_NVFP4 = "W4A16_NVFP4"
    W4A8_NVFP4_FP8 = "W4A8_NVFP4_FP8"
    MXFP4 = "MXFP4"
    W4A8_MXFP4_FP8 = "W4A8_MXFP4_FP8"
    MXFP8 = "MXFP8"
    MIXED = "MIXED_PRECISION"
    """Of a whole model: linears of different schemes."""


class KvScheme(Enum):
    """How keys and values are quantised."""

    NONE = "none"
    FP8 = "FP8"
    INT8 = "INT8"
    NVFP4 = "NVFP4"


class QuantizerProperties(Struct, frozen=True):
    """One quantiser: what it is told to do, not its values."""

    num_bits: NumBits = 8
    axis: tuple[int, ...] | None = None
    """Dims that have an amax each; None: one for the tensor."""
    block_sizes: tuple[tuple[int, int | None], ...] = ()
    """(dim, elements per block; None: the whole dim)."""
    block_type: str | None = None
    """"static" or "dynamic", of blocks."""
    scale_bits: tuple[int, int] | None = None
    """Of the scales of blocks."""
    dynamic: bool = False
    """Whether amax is found while running."""
    enabled: bool = True
    fake: bool = True
    """Whether values are only rounded; False: weights are stored quantised."""
    buffers: tuple[str, ...] = ()
    """Names of the tensors that it keeps: _amax, _pre_quant_scale, …; only known from a module's own state."""

    @property
    def block_size(self) -> int | None:
        """Elements of a block along the last dim; None without blocks."""
        return next((size for dim, size in self.block_sizes if dim == -1 and size), None)


class LinearScheme(Struct, frozen=True):
    """How one linear is quantised."""

    scheme: Scheme
    weight: tuple[QuantizerProperties, ...] = ()
    """Two of W4A8: INT4 by block, then FP8."""
    input: QuantizerProperties | None = None
    group_size: int | None = None
    pre_quant_scale: bool | None = None
    """Whether the input is multiplied by a factor per channel; None: not said."""
    compressed: bool = False
    """Whether the weight is stored quantised."""

    @property
    def static_activation(self) -> bool:
        """Whether the input has an amax of its own in the checkpoint."""
        return self.input is not None and self.input.enabled and not self.input.dynamic and not _by_token(self.input)


def _by_token(properties: QuantizerProperties) -> bool:
    return bool(properties.block_sizes) and properties.block_size is None


def properties_of(state: Mapping[Any, Any]) -> QuantizerProperties:
    """Out of a quantiser's own state (``_num_bits``, …) or its configuration (``num_bits``, …).

    Raises ValueError for values that no quantiser has.
    """
    is_state = "_num_bits" in state
    prefix = "_" if is_state else ""
    blocks = state.get(f"{prefix}block_sizes") or {}
    if not isinstance(blocks, Mapping):
        raise ValueError(f"block sizes are {blocks!r:.80}")
    scale_bits = blocks.get("scale_bits")
    metadata = state.get("_pytorch_state_metadata")
    buffers = metadata.get("buffers") if isinstance(metadata, Mapping) else None
    named = tuple(sorted(map(str, buffers))) if isinstance(buffers, Mapping) else ()
    enabled = not state.get("_disabled", False) if is_state else state.get("enable", True)
    dynamic = state.get("_dynamic") if is_state else state.get("type") == "dynamic"
    return QuantizerProperties(
        num_bits=_num_bits(state.get(f"{prefix}num_bits", 8)),
        axis=_axis(state.get(f"{prefix}axis")),
        block_sizes=tuple(sorted((dim, _size(size)) for dim, size in blocks.items() if type(dim) is int)),
        block_type=str(blocks.get("type") or "static") if blocks else None,
        scale_bits=None if scale_bits is None else _pair(scale_bits),
        dynamic=bool(dynamic),
        enabled=bool(enabled),
        fake=bool(state.get(f"{prefix}fake_quant", True)),
        buffers=named,
    )


_NAMED_BITS: dict[str, NumBits] = {"e4m3": E4M3, "e2m1": E2M1, "int8": 8, "int4": 4}


def _num_bits(value: object) -> NumBits:
    if type(value) is int:
        return int(value)
    if isinstance(value, str) and value in _NAMED_BITS:
        return _NAMED_BITS[value]
    return _pair(value)


def _pair(value: object) -> tuple[int, int]:
    if not isinstance(value, tuple | list) or len(value) != 2 or not all(type(bits) is int for bits in value):
        raise ValueError(f"number of bits is {value!r:.80}")
    return value[0], value[1]


def _axis(value: object) -> tuple[int, ...] | None:
    if value is None or type(value) is int:
        return None if value is None else (value,)
    if not isinstance(value, tuple | list) or not all(type(dim) is int for dim in value):
        raise ValueError(f"axis is {value!r:.80}")
    return tuple(value)


def _size(value: object) -> int | None:
    if value is not None and (type(value) is not int or value < 1):
        raise ValueError(f"a block of {value!r:.80} elements")
    return value


def linear_scheme(
    quantizers: Mapping[str, tuple[QuantizerProperties, ...]], *, compressed: bool = False
) -> LinearScheme:
    """The scheme of a linear with these quantisers, by their names in the module.

    Raises ValueError naming what makes a combination that has no name.
    """
    weights = quantizers.get("weight_quantizer", ())
    inputs = quantizers.get("input_quantizer", ())
    entry = inputs[0] if inputs else None
    if not weights or not any(each.enabled for each in weights):
        return LinearScheme(Scheme.NONE, weights, entry)
    buffers = {name for each in (*weights, *inputs) for name in each.buffers}
    scheme = _two_levels(weights) if len(weights) > 1 else _one_level(weights[0], entry, buffers)
    return LinearScheme(
        scheme=scheme,
        weight=weights,
        input=entry,
        group_size=weights[0].block_size,
        pre_quant_scale="_pre_quant_scale" in buffers if any(each.buffers for each in (*weights, *inputs)) else None,
        compressed=compressed or any("_scale" in each.buffers for each in weights),
    )


def _two_levels(weights: tuple[QuantizerProperties, ...]) -> Scheme:
    kinds = [each.num_bits for each in weights]
    if kinds != [4, E4M3] or weights[0].block_size is None:
        raise ValueError(
            f"the weight is quantised {len(weights)} times, to {kinds}, where INT4 by block and FP8 is known"
        )
    return Scheme.W4A8_AWQ


def _one_level(weight: QuantizerProperties, entry: QuantizerProperties | None, buffers: set[str]) -> Scheme:
    active = entry if entry is not None and entry.enabled else None
    if weight.num_bits == 4 and weight.block_size:
        return Scheme.INT4_AWQ
    if weight.num_bits == 8 and not weight.block_sizes:
        return Scheme.INT8_SQ if active else Scheme.INT8_WO
    if weight.num_bits == E4M3:
        return _fp8(weight, active)
    if weight.num_bits == E2M1 and weight.block_size:
        return _fp4(weight, active, buffers)
    raise ValueError(f"the weight is quantised to {weight.num_bits} bits with blocks of {weight.block_size}")


def _fp8(weight: QuantizerProperties, active: QuantizerProperties | None) -> Scheme:
    if weight.block_sizes:
        return Scheme.MXFP8 if weight.scale_bits == E8M0 else Scheme.FP8_BLOCK
    if weight.axis is None:
        return Scheme.FP8
    if weight.axis == (0,) and (active is None or active.dynamic or _by_token(active)):
        return Scheme.FP8_PER_CHANNEL_PER_TOKEN
    raise ValueError(f"the weight is FP8 with an amax per {list(weight.axis)} and an input that has a fixed amax")


def _fp4(weight: QuantizerProperties, active: QuantizerProperties | None, buffers: set[str]) -> Scheme:
    fp8_input = active is not None and active.num_bits == E4M3 and not active.block_sizes
    if weight.scale_bits == E8M0:
        return Scheme.W4A8_MXFP4_FP8 if fp8_input else Scheme.MXFP4
    if weight.scale_bits != E4M3:
        raise ValueError(f"the weight is FP4 with scales of {weight.scale_bits} bits")
    if "svdquant_lora_a" in buffers:
        return Scheme.NVFP4_SVDQUANT
    if "_pre_quant_scale" in buffers:
        return Scheme.NVFP4_AWQ
    if active is None:
        return Scheme.W4A16_NVFP4
    return Scheme.W4A8_NVFP4_FP8 if fp8_input else Scheme.NVFP4


def kv_scheme(quantizers: Iterable[QuantizerProperties]) -> KvScheme:
    """How the KV cache is quantised, from the quantisers of keys and values (or of linear_qkv's output).

    Raises ValueError for kinds that have no name or contradict each other.
    """
    kinds = {each.num_bits for each in quantizers if each.enabled}
    if not kinds:
        return KvScheme.NONE
    known = {E4M3: KvScheme.FP8, 8: KvScheme.INT8, E2M1: KvScheme.NVFP4}
    if len(kinds) > 1 or next(iter(kinds)) not in known:
        raise ValueError(f"keys and values are quantised to {', '.join(map(str, kinds))} bits")
    return known[kinds.pop()]


def overall(schemes: Iterable[LinearScheme]) -> Scheme:
    """The scheme of a model: that of its quantised linears, `Scheme.MIXED` where they differ, NONE without any."""
    kinds = {(each.scheme, each.group_size) for each in schemes if each.scheme is not Scheme.NONE}
    if not kinds:
        return Scheme.NONE
    return next(iter(kinds))[0] if len(kinds) == 1 else Scheme.MIXED


def described(error: ValueError, module: object) -> ExportError:
    """The fault of a module for the user."""
    return ExportError(f"{module}: {error}; such a quantisation is not known and cannot be exported")
