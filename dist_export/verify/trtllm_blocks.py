"""Layers that differ, as tensorrt_llm/models/nemotron_nas/{config,model}.py read them from config.json."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

DECI_CLASS = ("DeciLMForCausalLM",)
_KINDS = "kinds of this layer"
FULL = ("attention", "mlp")


def conditions(raw: Mapping[str, Any]) -> Iterator[tuple[bool, str]]:
    """What must hold for a configuration to be interpreted, and what to say where it does not."""
    configs = raw.get("layer_configs")
    yield isinstance(configs, list), "DeciLMForCausalLM without layer_configs"
    if isinstance(configs, list):
        yield len(configs) == raw["num_hidden_layers"], "layer_configs that are not one per layer"


def of_layer(raw: Mapping[str, Any], layer: int) -> Mapping[str, Any]:
    """The configuration with the sizes of one layer, and what stands in the place of its attention and MLP."""
    if raw["architecture"] not in DECI_CLASS:
        return raw
    config = raw["layer_configs"][layer]
    attention, ffn = config["attention"], config["ffn"]
    return {
        **raw,
        "num_key_value_heads": attention.get("num_key_value_heads") or raw.get("num_key_value_heads"),
        "intermediate_size": ffn.get("intermediate_size") or raw.get("intermediate_size"),
        _KINDS: (attention.get("impl", FULL[0]), ffn.get("impl", FULL[1])),
    }


def kinds(raw: Mapping[str, Any]) -> tuple[str, str]:
    """(attention, linear or no_op; mlp, linear or no_op) of the configuration of a layer."""
    attention, ffn = raw.get(_KINDS, FULL)
    return str(attention), str(ffn)


def shapes(
    raw: Mapping[str, Any], plain: Mapping[str, tuple[int, ...]], *, hidden: int, tp_size: int
) -> dict[str, tuple[int, ...]]:
    """The tensors of a layer out of those that it would have as a plain one; the MLP is called ``ffn``."""
    attention, ffn = kinds(raw)
    parts = {"attention.": (attention, "input_layernorm."), "mlp.": (ffn, "post_layernorm.")}
    found: dict[str, tuple[int, ...]] = {}
    for head, (kind, norm) in parts.items():
        if kind != "no_op":
            found |= {name: shape for name, shape in plain.items() if name.startswith(norm)}
        if kind in FULL:
            inner = {name: shape for name, shape in plain.items() if name.startswith(head)}
            found |= {name.replace("mlp.", "ffn.", 1): shape for name, shape in inner.items()}
        elif kind == "linear":
            found[head.replace("mlp", "ffn") + "weight"] = (hidden // tp_size, hidden)
    return found
