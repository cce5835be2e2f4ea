"""Overrides are typed by ModelConfig itself, on the command line and in files."""

from __future__ import annotations

from pathlib import Path

import pytest

from dist_export.errors import ExportError
from dist_export.models.config import RopeScaling
from dist_export.models.overrides import coerce_override, overrides_from_file, parse_override


@pytest.mark.parametrize(
    ("field", "text", "value"),
    [
        ("num_layers", "32", 32),
        ("norm_epsilon", "1e-6", 1e-6),
        ("rotary_base", "500000", 500000.0),
        ("gated", "true", True),
        ("gated", "No", False),
        ("activation", "squared_relu", "squared_relu"),
        ("position_embedding", "none", "none"),
        ("window_size", "none", None),
        ("window_size", "4095", 4095),
        ("moe_layer_freq", "0,1,1", (0, 1, 1)),
        ("moe_layer_freq", "[0, 1]", (0, 1)),
        ("moe_layer_freq", "none", None),
        ("moe_router_scaling_factor", "2.5", 2.5),
        ("rope_scaling", "none", None),
        ("rope_scaling", "linear:4", RopeScaling("linear", 4.0)),
        ("rope_scaling", "llama3:32", RopeScaling("llama3", 32.0, 1.0, 4.0, 8192)),
        ("rope_scaling", "llama3:16:1:2:4096", RopeScaling("llama3", 16.0, 1.0, 2.0, 4096)),
    ],
)
def test_text_is_parsed_by_the_type_of_the_field(field: str, text: str, value: object) -> None:
    parsed = parse_override(field, text)
    assert parsed == value
    assert type(parsed) is type(value)
    assert coerce_override(field, parsed) == value  # idempotent


@pytest.mark.parametrize(
    ("field", "text", "message"),
    [
        ("num_layers", "many", "num_layers: 'many' is not an integer"),
        ("num_layers", "none", "num_layers: 'none' is not an integer"),
        ("norm_epsilon", "small", "norm_epsilon: 'small' is not a number"),
        ("gated", "maybe", "gated: 'maybe' is not true or false"),
        ("activation", "swish", "activation is 'swish', must be one of"),
        ("moe_layer_freq", "0,x", "moe_layer_freq: 'x' is not an integer"),
        ("rope_scaling", "yarn:4", "is not linear:FACTOR, llama3:FACTOR"),
        ("rope_scaling", "yarn:40:x", "rope_scaling: 'x' is not an integer"),
        ("rope_scaling", "llama3:8:1", "is not linear:FACTOR, llama3:FACTOR"),
        ("blocks", "[{}]", "is not a list with attention, ffn_hidden_size, mlp, num_query_groups"),
        ("blocks", "[", "blocks: not valid JSON"),
        ("rope_scaling", "linear:0", "factor 0.0 is not a positive number"),
        ("num_layer", "4", "no model configuration field 'num_layer'; did you mean num_layers"),
        ("qqq", "4", r"no model configuration field 'qqq' \(known fields: num_layers, "),
    ],
)
def test_bad_text_is_an_error(field: str, text: str, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        parse_override(field, text)


YAML = """
norm_epsilon: 1e-6      # YAML 1.1 reads this as text
rotary_base: 500000
gated: true
moe_layer_freq: [0, 1]
window_size: null
rope_scaling: {kind: llama3, factor: 8, original_max_position_embeddings: 4096}
activation: silu
"""
JSON = """{"norm_epsilon": 1e-6, "rotary_base": 500000, "gated": true, "moe_layer_freq": [0, 1],
"window_size": null, "activation": "silu",
"rope_scaling": {"kind": "llama3", "factor": 8, "original_max_position_embeddings": 4096}}"""


@pytest.mark.parametrize(("name", "text"), [("overrides.yaml", YAML), ("overrides.json", JSON)])
def test_files_give_values_and_their_source(tmp_path: Path, name: str, text: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    overrides = overrides_from_file(path)
    assert {field: value for field, (value, _) in overrides.items()} == {
        "norm_epsilon": 1e-6,
        "rotary_base": 500000.0,
        "gated": True,
        "moe_layer_freq": (0, 1),
        "window_size": None,
        "rope_scaling": RopeScaling("llama3", 8.0, 1.0, 4.0, 4096),
        "activation": "silu",
    }
    assert {source for _, source in overrides.values()} == {f"file {path}"}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.yaml", "hidden_sise: 4\nnum_layers: 1.5\n", r"(?s)2 faults.*did you mean hidden_size.*1.5 is not an int"),
        ("a.yaml", "num_layers: true\n", "num_layers: True is not an integer"),
        ("a.yaml", "gated: 2\n", "gated: 2 is not true or false"),
        ("a.yaml", "activation: 2\n", "activation: 2 is not a word"),
        ("a.yaml", "rope_scaling: {factor: 2}\n", "is not a mapping with kind, factor"),
        ("a.yaml", "rope_scaling: {kind: linear, factor: 2, f: 1}\n", "is not a mapping with kind, factor"),
        ("a.yaml", "- 1\n", "holds a list, expected 'field: value' lines"),
        ("a.yaml", "", "holds a NoneType"),
        ("a.yaml", "a: [\n", "is not valid YAML"),
        ("a.yaml", "a: !!python/object/apply:os.getcwd []\n", "is not valid YAML"),
        ("a.json", "{", "is not valid JSON"),
        ("a.yaml", None, "cannot be read"),
    ],
)
def test_bad_files_are_one_error(tmp_path: Path, name: str, text: str | None, message: str) -> None:
    path = tmp_path / name
    if text is not None:
        path.write_text(text)
    with pytest.raises(ExportError, match=message):
        overrides_from_file(path)
