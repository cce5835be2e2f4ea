"""Which tensors of a checkpoint are a quantiser's: names to the module they belong to and what they are.

Source of the names: modelopt/torch/quantization/plugins/megatron.py and nn/modules/tensor_quantizer.py (buffers), as
Megatron-Core checkpoints of ModelOpt 0.23 to 0.47 have them.
"""

from __future__ import annotations

import re
from enum import Enum

from msgspec import Struct

_LAYERS = re.compile(r"^(?P<stack>decoder|mtp)\.layers\.(?:(?P<layer>\d+)\.)?(?P<rest>.*)$")
_EXPERTS = re.compile(r"^(?P<head>.*\.experts\.experts\.)(?:(?P<expert>\d+)\.)?(?P<rest>.*)$")
_LOCAL_EXPERTS = re.compile(r"\.experts\.local_experts\.(?=\d+\.)")
_GROUPED = re.compile(r"\.experts\.(?=linear_fc[12](?:\.|$))")
_QUANTIZER = re.compile(
    r"^(?P<module>.+?)\.(?P<quantizer>(?:\w+_)?quantizer)(?:\.(?P<number>\d+))?\.(?P<buffer>_?\w+)$"
)


class Quantity(Enum):
    """What a tensor of a quantiser is."""

    AMAX = "_amax"
    PRE_QUANT_SCALE = "_pre_quant_scale"
    SMOOTHING = "_smoothing_scale"
    """Of calibration files alone: what the columns of the checkpoint's weights are still to be divided by. It is
    `PRE_QUANT_SCALE` in float32, before it was rounded. Without it weights are stored smoothed."""
    SCALE = "_scale"
    """Of compressed weights."""
    DOUBLE_SCALE = "_double_scale"
    """Of compressed NVFP4 weights: the scale of the whole tensor."""
    GLOBAL_AMAX = "_global_amax"
    """Of NVFP4 with static blocks: amax of the whole tensor."""
    BIAS = "_bias_value"
    """Of affine KV caches."""
    SVDQUANT_A = "svdquant_lora_a"
    SVDQUANT_B = "svdquant_lora_b"


class Quantizer(Enum):
    """Which quantiser of a module; its value is the name it has there."""

    WEIGHT = "weight_quantizer"
    INPUT = "input_quantizer"
    OUTPUT = "output_quantizer"
    QUERY = "q_bmm_quantizer"
    KEY = "k_bmm_quantizer"
    VALUE = "v_bmm_quantizer"
    NORM_INPUT = "layer_norm_input_quantizer"
    """Of the norm in front of a linear: no scale of a linear. Also any quantiser of a norm module."""
    OTHER = "quantizer"
    """Of a name that is not known."""


class ModuleName(Struct, frozen=True):
    """A module of the model, its numbers taken out of the name."""

    pattern: str
    """With ``{layer}`` and ``{expert}``, as rules name it: ``decoder.layers.{layer}.mlp.linear_fc1``."""
    layer: int = -1
    """-1: none, or all layers are stacked in the tensor."""
    expert: int = -1
    """-1: none, or all experts are."""

    def __str__(self) -> str:
        layer = "" if self.layer < 0 else f"{self.layer}."
        expert = "" if self.expert < 0 else f"{self.expert}."
        return self.pattern.replace("{layer}.", layer).replace("{expert}.", expert)


class QuantizerTensor(Struct, frozen=True):
    """A tensor of a quantiser."""

    module: ModuleName
    quantizer: Quantizer
    quantity: Quantity | None
    """None: a buffer that is not known."""
    number: int | None = None
    """Which one of several quantisers that follow each other (W4A8 AWQ: 0 is INT4 by block, 1 is FP8)."""

    @property
    def concerns_linear(self) -> bool:
        """Whether it scales weights or activations of a linear layer or the KV cache, and is not a norm's own."""
        return self.quantizer is not Quantizer.NORM_INPUT


def module_name(name: str) -> ModuleName:
    """A module's (or tensor's) name folded; those of legacy files get the name that ``torch_dist`` has for them.

    >>> module_name("decoder.layers.3.mlp.experts.local_experts.7.linear_fc2")
    ModuleName(pattern='decoder.layers.{layer}.mlp.experts.experts.{expert}.linear_fc2', layer=3, expert=7)
    """
    name = _LOCAL_EXPERTS.sub(".experts.experts.", name)
    if ".experts.experts." not in name:
        name = _GROUPED.sub(".experts.experts.", name)
    layer = expert = -1
    match = _LAYERS.match(name)
    if match:
        layer = int(match["layer"]) if match["layer"] else -1
        name = f"{match['stack']}.layers.{{layer}}.{match['rest']}"
    match = _EXPERTS.match(name)
    if match:
        expert = int(match["expert"]) if match["expert"] else -1
        name = f"{match['head']}{{expert}}.{match['rest']}"
    return ModuleName(name, layer, expert)


def quantizer_tensor(name: str) -> QuantizerTensor | None:
    """What the tensor `name` is to a quantiser, None for one that is of no quantiser.

    Experts of TransformerEngine's grouped linear may have their quantiser numbered by expert
    (``weight_quantizer.5._amax`` under ``experts.experts.linear_fc1``): the number stays in `number`.
    """
    match = _QUANTIZER.match(name)
    if match is None:
        return None
    module = module_name(match["module"])
    number = int(match["number"]) if match["number"] else None
    return QuantizerTensor(module, quantizer_of(match["quantizer"], module.pattern), _quantity(match["buffer"]), number)


def quantizer_of(name: str, module: str) -> Quantizer:
    """The quantiser `name` of a module whose name is `module`."""
    if module.rpartition(".")[2].endswith("layernorm"):
        return Quantizer.NORM_INPUT
    return _QUANTIZERS.get(name, Quantizer.OTHER)


_QUANTIZERS = {quantizer.value: quantizer for quantizer in Quantizer}
_QUANTITIES = {quantity.value: quantity for quantity in Quantity}


def _quantity(buffer: str) -> Quantity | None:
    return _QUANTITIES.get(buffer)
