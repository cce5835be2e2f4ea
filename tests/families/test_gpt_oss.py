"""gpt-oss: experts in the order of their consumers, and what is refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from support.exports import config_of, export, run_command, tensors_of
from support.torch_dist import change_args

from dist_export.convert.permute import in_order

CHECKPOINT = Path(__file__).parents[1] / "conformance" / "checkpoints" / "gpt_oss_core_0_16"
GATE_UP = "model.layers.1.mlp.experts.gate_up_proj"


@pytest.fixture
def checkpoint(tmp_path):
    """A copy of the checkpoint with other arguments."""

    def changed(**args: object) -> Path:
        folder = tmp_path / "checkpoint"
        shutil.copytree(CHECKPOINT, folder)
        change_args(folder / "iter_0000010", **args)
        return folder

    return changed


def test_halves_alternate_before_a_transposition():
    block = np.arange(8).reshape(4, 2)  # gate rows 0 and 1, up rows 2 and 3
    assert in_order(block, interleaved=True, transposed=False).tolist() == [[0, 1], [4, 5], [2, 3], [6, 7]]
    assert in_order(block, interleaved=True, transposed=True).tolist() == [[0, 4, 2, 6], [1, 5, 3, 7]]
    assert in_order(np.arange(4), interleaved=True, transposed=False).tolist() == [0, 2, 1, 3]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_it_is_cast_in_the_order_of_the_consumer_and_rebuilt(dtype, tmp_path):
    same, cast = (
        tensors_of(next(export(CHECKPOINT, tmp_path / each, "--target", "hf", "--dtype", each).glob("*.safetensors")))
        for each in ("bfloat16", dtype)
    )
    assert all(torch.equal(cast[name], same[name].to(getattr(torch, dtype))) for name in same)
    assert run_command("verify", CHECKPOINT, tmp_path / dtype).returncode == 0


def test_several_processes_and_files_write_the_same_bytes(tmp_path):
    one = tensors_of(next(export(CHECKPOINT, tmp_path / "one", "--target", "hf").glob("*.safetensors")))
    several = export(CHECKPOINT, tmp_path / "several", "--target", "hf", "--num-processes", 3, "--max-file-size", "30k")
    files = sorted(several.glob("*.safetensors"))
    assert len(files) > 2
    found = {name: tensor for file in files for name, tensor in tensors_of(file).items()}
    assert found.keys() == one.keys()
    assert all(torch.equal(found[name], one[name]) for name in one)


@pytest.mark.parametrize("name, element", [(GATE_UP, 1000), (GATE_UP + "_bias", 61), (GATE_UP, 6143)])
def test_a_flipped_bit_in_reordered_experts_is_found(name, element, tmp_path):
    output = export(CHECKPOINT, tmp_path / "out", "--target", "hf")
    file = output / "model.safetensors"
    data = bytearray(file.read_bytes())
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    data[8 + length + header[name]["data_offsets"][0] + 2 * element] ^= 1
    file.write_bytes(data)
    process = run_command("verify", CHECKPOINT, output)
    assert process.returncode == 4
    assert name in process.stdout + process.stderr


@pytest.mark.parametrize(
    "args, message",
    [
        ({"softmax_type": "off-by-one"}, "the softmax has one added to its sum"),
        ({"softmax_type": "vanilla"}, "attention_sinks: checkpoint args: softmax_type says false"),
        ({"glu_linear_offset": 0.0}, "its activation is clamped at 7 and its offset is 1"),
        ({"mscale": 0.707, "mscale_all_dim": 0.707}, "its rotary scaling is yarn with mscale 1"),
        ({"window_size": None}, "it has an attention window in some layers"),
        ({"moe_router_score_function": "sigmoid"}, "the router scores by sigmoid"),
    ],
)
def test_what_the_class_does_not_compute_is_refused(args, message, checkpoint, tmp_path):
    process = run_command("export", checkpoint(**args), tmp_path / "out", "--target", "hf")
    assert process.returncode == 2, process.stdout
    assert message in process.stderr
    assert not (tmp_path / "out").exists()


def test_engines_are_refused(tmp_path):
    process = run_command("export", CHECKPOINT, tmp_path / "out")
    assert process.returncode == 2
    assert "no engine class computes attention sinks" in process.stderr
    assert "export it with --target hf" in process.stderr


def test_arguments_of_a_release_without_the_numbers_of_yarn_need_them_from_the_user(checkpoint, tmp_path):
    numbers = ("original_max_position_embeddings", "beta_fast", "beta_slow", "correction_range_round_to_int")
    folder = checkpoint()
    common = folder / "iter_0000010" / "common.pt"
    state = torch.load(common, weights_only=False)
    for name in numbers:
        delattr(state["args"], f"yarn_{name}")
    torch.save(state, common)
    refused = run_command("export", folder, tmp_path / "refused", "--target", "hf")
    assert refused.returncode == 2
    assert "the checkpoint args hold none of its numbers" in refused.stderr
    output = export(folder, tmp_path / "out", "--target", "hf", "--set", "rope_scaling=yarn:16:4096")
    scaling = config_of(output)["rope_scaling"]
    assert scaling["factor"] == 16 and scaling["original_max_position_embeddings"] == 4096 and scaling["truncate"]
