"""DeciLM: layers that differ, from the arguments that describe them to what is refused."""

import json
import shutil
from pathlib import Path

import pytest
from support.exports import config_of, export, run_command
from support.torch_dist import change_args

from dist_export.errors import ExportError, Faults
from dist_export.models.blocks import Block, Blocks, blocks_from_json, ffn_size_of
from dist_export.models.heterogeneous import block_list_claim
from dist_export.models.megatron_arguments import Arguments
from dist_export.models.refusals import ENCODED_BLOCKS

CHECKPOINT = Path(__file__).parents[1] / "conformance" / "checkpoints" / "decilm_core_0_16"
DEFAULT = Block("full", 2, "full", 128)
BLOCKS = [
    {"attention": "full", "num_query_groups": 4, "mlp": "full", "ffn_hidden_size": 256},
    {"attention": "no_op", "num_query_groups": 0, "mlp": "full", "ffn_hidden_size": 512},
    {"attention": "full", "num_query_groups": 2, "mlp": "no_op", "ffn_hidden_size": 0},
    {"attention": "linear", "num_query_groups": 0, "mlp": "linear", "ffn_hidden_size": 0},
]


def read(entries: object) -> Blocks:
    return blocks_from_json(json.dumps(entries), num_attention_heads=8, hidden_size=64, default=DEFAULT)


def test_blocks_are_read_in_both_spellings_and_sizes_default_to_the_models():
    entries = [
        {"attention": {"n_heads_in_group": 4}, "ffn": {"ffn_mult": 5.0}},
        {"attention": {"num_query_groups": 8}, "mlp": {"ffn_hidden_size": 96}},
        {"attention": {"n_heads_in_group": None}, "ffn": {"ffn_mult": None, "no_op": True}},
    ]
    found = read({"block_configs": entries}).layers
    assert found == (Block("full", 2, "full", 256), Block("full", 8, "full", 96), Block("full", 2, "no_op", 0))
    assert [ffn_size_of(multiple, 8192) for multiple in (0.5, 1.3125, 2.625, 5.25)] == [2816, 7168, 14336, 28672]


@pytest.mark.parametrize(
    "arguments, block",
    [
        ({"num_query_groups": 2, "ffn_hidden_size": 96}, Block("full", 2, "full", 96)),
        ({}, Block("full", 8, "full", 256)),  # as many groups as heads, four times the hidden size
    ],
)
def test_blocks_without_sizes_have_those_of_the_saved_arguments(arguments, block):
    entries = {"block_configs": [{"attention": {}, "ffn": {}}]}
    faults = Faults("arguments")
    saved = Arguments({ENCODED_BLOCKS: json.dumps(entries), **arguments}, faults)
    assert block_list_claim(saved, heads=8, hidden=64).value == Blocks((block,))
    assert not faults


@pytest.mark.parametrize(
    "entries, message",
    [
        ({}, "there is no list of block_configs"),
        ([{"attention": {}}], "an entry has no ffn or mlp"),
        ([{"attention": {"n_heads_in_group": 3}, "ffn": {}}], "8 attention heads are no multiple"),
        ([{"attention": {"window_length": 32}, "ffn": {}}], "no target computes window_length"),
        ([{"attention": {"num_query_groups": "two"}, "ffn": {}}], "is 'two', not an integer"),
    ],
)
def test_unusable_blocks_are_refused(entries, message):
    with pytest.raises(ExportError, match=message):
        read(entries)


def test_a_checkpoint_without_the_description_takes_it_from_the_command_line(tmp_path):
    folder = tmp_path / "checkpoint"
    shutil.copytree(CHECKPOINT, folder)
    change_args(
        folder / "iter_0000010",
        heterogeneous_layers_config_encoded_json=None,
        heterogeneous_layers_config_path=None,
    )
    refused = run_command("export", folder, tmp_path / "refused")
    assert refused.returncode == 2
    output = export(folder, tmp_path / "out", "--set", "blocks=" + json.dumps(BLOCKS))
    assert config_of(output) == config_of(export(CHECKPOINT, tmp_path / "same"))
    assert (output / "rank0.safetensors").read_bytes() == (tmp_path / "same" / "rank0.safetensors").read_bytes()


@pytest.mark.parametrize(
    "options, message",
    [
        (("--trtllm-version", "0.13"), "the class is in TensorRT-LLM 0.14 to 1.2, not in 0.13"),
        (("--tp", "3"), "do not divide by tp 3"),
        (("--set", "blocks=" + json.dumps(BLOCKS[:3])), "blocks has 3 entries for num_layers 4"),
        (("--set", "blocks=" + json.dumps([*BLOCKS[:3], {**BLOCKS[3], "mlp": "no_op"}])), "mlp.weight"),
        (("--family", "llama"), "it has layers that differ"),
    ],
)
def test_what_it_cannot_be_is_refused_before_anything_is_written(options, message, tmp_path):
    process = run_command("export", CHECKPOINT, tmp_path / "out", *options)
    assert process.returncode == 2
    assert message in process.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("options", [("--tp", "4"), ("--tp", "2", "--pp", "2"), ("--target", "hf")])
def test_it_is_rebuilt_bit_for_bit(options, tmp_path):
    output = export(CHECKPOINT, tmp_path / "out", *options)
    assert run_command("verify", CHECKPOINT, output).returncode == 0
