"""Quantised tensors by their names: the codes of a weight, and what lies beside them."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum

from msgspec import Struct, field

from dist_export.checkpoint.quantizer_names import ModuleName
from dist_export.models.source_tensor import SourceTensor
from dist_export.plan.work import OutputTensor, Use

Cells = tuple[int, int, int, int]
"""First row, row end, first column, column end."""


class Kind(Enum):
    """What a tensor beside a weight is."""

    SCALE = "scale of its weights"
    SECOND = "second scale of its weights"
    INPUT = "scale of its activations"
    FACTOR = "factor of its activations"
    SHAPE = "shape of its weights"
    KEY = "scale of the cached keys"
    VALUE = "scale of the cached values"
    KEY_VALUE = "scale of the cached keys and values"


KINDS: Mapping[str, Kind] = {
    "weights_scaling_factor": Kind.SCALE,
    "per_channel_scale": Kind.SCALE,
    "weight_scale": Kind.SCALE,
    "weights_scaling_factor_2": Kind.SECOND,
    "weight_scale_2": Kind.SECOND,
    "weight_global_scale": Kind.SECOND,
    "activation_scaling_factor": Kind.INPUT,
    "input_scale": Kind.INPUT,
    "input_global_scale": Kind.INPUT,
    "weight_shape": Kind.SHAPE,
    "prequant_scaling_factor": Kind.FACTOR,
    "pre_quant_scale": Kind.FACTOR,
    "k_cache_scaling_factor": Kind.KEY,
    "k_scale": Kind.KEY,
    "v_cache_scaling_factor": Kind.VALUE,
    "v_scale": Kind.VALUE,
    "kv_cache_scaling_factor": Kind.KEY_VALUE,
}
"""Last part of a tensor's name, as either target has it, to what it is."""
RECIPROCAL = ("weight_global_scale", "input_global_scale")
"""Names of scales by which one multiplies to quantise."""
TAKES_OVER = {
    "v_proj": ("linear_qkv", "linear_proj"),
    "up_proj": ("linear_fc1", "linear_fc2"),
    "w3": ("linear_fc1", "linear_fc2"),
}
"""Linear -> (its module, the module behind): its rows may take over the factor of the activations behind it."""


class Quantised(Struct):
    """One weight of the output that is made of quantised modules."""

    output: OutputTensor
    uses: list[tuple[SourceTensor, ModuleName, Use]] = field(default_factory=list)
    """What fills it: of which source weight and module."""
    companions: dict[Kind, OutputTensor] = field(default_factory=dict)

    @property
    def rows_per_slice(self) -> int:
        """Rows of one expert where the weight is stacked over experts, else all."""
        shape = self.output.planned.view.shape
        return shape[-2]

    def modules(self, row: int | None = None) -> tuple[ModuleName, ...]:
        """Those that fill the slice of a row, or the whole weight."""
        within = None if row is None else row // self.rows_per_slice
        found = (m for _, m, u in self.uses if within is None or u.row // self.rows_per_slice == within)
        return tuple(dict.fromkeys(found))
