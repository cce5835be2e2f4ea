"""The activation function and the MLP width behind Megatron's many switches."""

from __future__ import annotations

from dist_export.models.megatron_arguments import Arguments
from dist_export.models.provenance import Claim, derived, from_arguments, from_default

#: `activation_func` of a `TransformerConfig`, by the last part of the function's name.
_FUNCTIONS: dict[str, str] = {
    "gelu": "gelu",
    "erf_gelu": "gelu",
    "fast_gelu": "gelu_tanh",
    "openai_gelu": "gelu_tanh",
    "openai_gelu_func": "gelu_tanh",
    "gelu_tanh": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "squared_relu": "squared_relu",
    "relu2": "squared_relu",
    "quick_gelu": "quick_gelu",
}

#: Switch -> (activation, gated). At most one is on: Megatron asserts it.
_SWITCHES: dict[str, tuple[str, bool]] = {
    "swiglu": ("silu", True),
    "squared_relu": ("squared_relu", False),
    "quick_geglu": ("quick_gelu", True),
}


def activation_claims(arguments: Arguments, linear_bias: bool) -> dict[str, Claim]:
    """Claims for `activation` and `gated`."""
    on = [name for name in _SWITCHES if arguments.switch(name)]
    if len(on) > 1:
        arguments.faults.add(f"activation: the checkpoint args set {' and '.join(on)}, at most one can hold")
    if on:
        activation, gated = _SWITCHES[on[0]]
        return _both(activation, gated, from_arguments(on[0]))
    gated = arguments.switch("gated_linear_unit")
    if arguments.has("activation_func"):
        return _from_function(arguments, gated, linear_bias)
    activation, source = _gelu(arguments, gated, linear_bias)
    gate_source = from_arguments("gated_linear_unit" if gated else "swiglu")
    return {"activation": Claim(activation, source), "gated": Claim(gated, gate_source)}


def _both(activation: str, gated: bool, source: str) -> dict[str, Claim]:
    return {"activation": Claim(activation, source), "gated": Claim(gated, source)}


def _from_function(arguments: Arguments, gated: bool, linear_bias: bool) -> dict[str, Claim]:
    """A `TransformerConfig` names the function; fusing the bias still turns gelu into its tanh form."""
    name = arguments.word("activation_func")
    if name is None:
        return {"gated": Claim(gated, from_arguments("gated_linear_unit"))}
    activation = _FUNCTIONS.get(name.rsplit(".", 1)[-1])
    if activation is None:
        arguments.faults.add(f"activation: activation_func {name!r} is not known; give --set activation=NAME")
        return {"gated": Claim(gated, from_arguments("gated_linear_unit"))}
    source = from_arguments("activation_func")
    if activation == "gelu" and arguments.switch("bias_activation_fusion") and (gated or linear_bias):
        activation, source = "gelu_tanh", from_arguments("activation_func", "bias_activation_fusion")
    return {
        "activation": Claim(activation, source),
        "gated": Claim(gated, from_arguments("gated_linear_unit")),
    }


def _gelu(arguments: Arguments, gated: bool, linear_bias: bool) -> tuple[str, str]:
    """Which gelu: the fused bias kernels (fused_bias_gelu.py, fused_bias_geglu.py) compute the tanh form,
    `F.gelu` the exact one. Fusion is on by default and needs a bias unless gated."""
    if uses_legacy_model(arguments):
        if arguments.switch("openai_gelu"):
            return "gelu_tanh", from_arguments("openai_gelu")
        if arguments.switch("onnx_safe"):
            return "gelu", from_arguments("onnx_safe")
    fused = arguments.switch("bias_gelu_fusion", default=True)
    if fused and (gated or linear_bias):
        present = arguments.has("bias_gelu_fusion")
        return "gelu_tanh", from_arguments("bias_gelu_fusion") if present else from_default("bias_gelu_fusion")
    return "gelu", from_arguments("bias_gelu_fusion" if not fused else "add_bias_linear")


def activation_notes(arguments: Arguments, activation: object) -> list[str]:
    """A note when `openai_gelu` was asked for and the model was trained without it."""
    if activation != "gelu" or uses_legacy_model(arguments) or not arguments.switch("openai_gelu"):
        return []
    return [
        "activation: openai_gelu is set, but Megatron-Core models ignore it and compute the exact gelu; "
        "if the weights need the tanh form, give --set activation=gelu_tanh"
    ]


def uses_legacy_model(arguments: Arguments) -> bool:
    """Whether the model was Megatron-LM's own and not Megatron-Core's.

    Core models are opt-in from 0.4 to 0.7 (`use_mcore_models`), the default from 0.8, the only ones from
    0.18. `normalization` came with 0.4: arguments without it are older than core models.
    """
    if arguments.has("use_legacy_models"):
        return arguments.switch("use_legacy_models")
    if arguments.has("use_mcore_models"):
        return not arguments.switch("use_mcore_models")
    return not arguments.has("normalization")


def ffn_claim(arguments: Arguments, hidden_size: int | None) -> Claim | None:
    """`ffn_hidden_size`; Megatron saves the resolved number, and otherwise computes it like this."""
    saved = arguments.integer("ffn_hidden_size")
    if saved is not None:
        return Claim(saved, from_arguments("ffn_hidden_size"))
    if hidden_size is None:
        return None
    if arguments.switch("swiglu"):
        return Claim(
            int((4 * hidden_size * 2 / 3) / 64) * 64, derived("8/3 hidden_size to a multiple of 64"), default=True
        )
    return Claim(4 * hidden_size, derived("4 hidden_size"), default=True)


def qkv_bias_claim(arguments: Arguments, linear_bias: Claim | None) -> Claim | None:
    """`qkv_bias`: `add_qkv_bias` (0.5), and always with linear biases."""
    if linear_bias is not None and linear_bias.value:
        return Claim(True, linear_bias.source, default=linear_bias.default)
    if arguments.has("add_qkv_bias"):
        return Claim(arguments.switch("add_qkv_bias"), from_arguments("add_qkv_bias"))
    return Claim(False, from_default("add_qkv_bias"), default=True)


def moe_ffn_claim(arguments: Arguments, ffn: Claim | None) -> Claim | None:
    """`moe_ffn_hidden_size` (0.10); None or absent means `ffn_hidden_size`."""
    saved = arguments.integer("moe_ffn_hidden_size")
    if saved is not None:
        return Claim(saved, from_arguments("moe_ffn_hidden_size"))
    return None if ffn is None else Claim(ffn.value, derived("ffn_hidden_size"), default=True)
