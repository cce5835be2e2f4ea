"""DeepSeek: what its rules need of the saved arguments, and what they refuse before a weight is read."""

import json
import shutil
from pathlib import Path

import pytest
from support.exports import config_of, export, run_command, tensors_of
from support.torch_dist import change_args

CHECKPOINTS = Path(__file__).parents[1] / "conformance" / "checkpoints"


@pytest.fixture
def checkpoint(tmp_path):
    """A copy of a DeepSeek-V3 checkpoint with other arguments."""

    def changed(name: str = "deepseek_v3_core_0_16", **args: object) -> Path:
        folder = tmp_path / "checkpoint"
        shutil.copytree(CHECKPOINTS / name, folder)
        change_args(folder / "iter_0000010", **args)
        return folder

    return changed


@pytest.mark.parametrize("name", ["deepseek_v3_core_0_16", "deepseek_v2_core_0_16"])
def test_engines_are_refused_before_anything_is_written(name, tmp_path):
    process = run_command("export", CHECKPOINTS / name, tmp_path / "out")
    assert process.returncode == 2
    assert "the class stores products of the projections (attention.fused_q_proj)" in process.stderr
    assert "export it with --target hf" in process.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "args, message",
    [
        ({"moe_router_topk": 4}, "top-k must be twice the groups per token"),
        ({"moe_shared_expert_gate": True}, "its shared experts have no gate|moe_shared_expert_gate"),
        ({"kv_lora_rank": 16}, "kv_lora_rank: checkpoint args: kv_lora_rank says 16"),
        ({"v_head_dim": 8}, "value_head_size: checkpoint args: v_head_dim says 8"),
        ({"qk_head_dim": 6}, "qk_nope_head_size: checkpoint args: qk_head_dim says 6"),
        ({"mtp_num_layers": 2}, "missing tensor of layer 1: the checkpoint has no mtp.layers"),
        ({"mtp_num_layers": None}, "mtp.layers.0.enorm.weight: 32 of its 32 elements go nowhere"),
        ({"rope_type": "rope"}, "mscale_all_dim 0.707 still scale Megatron's scores"),
        ({"mscale_all_dim": 0.0}, "its yarn has mscale 1 where mscale_all_dim is 0"),
        ({"rotary_interleaved": True}, "its rotary embeddings are whole"),
    ],
)
def test_what_the_class_does_not_compute_is_refused(args, message, checkpoint, tmp_path):
    process = run_command("export", checkpoint(**args), tmp_path / "out", "--target", "hf")
    assert process.returncode == 2, process.stdout
    assert any(each in process.stderr for each in message.split("|")), process.stderr


@pytest.mark.parametrize(
    "args, expected",
    [
        ({"rotary_scaling_factor": 1.0}, None),
        ({"original_max_position_embeddings": 2048}, {"factor": 40.0, "original_max_position_embeddings": 2048}),
    ],
)
def test_yarn_is_read_from_the_arguments_of_latent_attention(args, expected, checkpoint, tmp_path):
    scaling = config_of(export(checkpoint(**args), tmp_path / "out", "--target", "hf"))["rope_scaling"]
    assert scaling == expected if expected is None else expected.items() <= scaling.items()


def test_layers_that_predict_further_tokens_bring_copies_of_embedding_and_head(tmp_path):
    output = export(CHECKPOINTS / "deepseek_v3_core_0_16", tmp_path / "out", "--target", "hf", "--dtype", "float32")
    tensors = tensors_of(next(output.glob("*.safetensors")))
    assert tensors["model.layers.2.embed_tokens.weight"].equal(tensors["model.embed_tokens.weight"])
    assert tensors["model.layers.2.shared_head.head.weight"].equal(tensors["lm_head.weight"])
    assert run_command("verify", CHECKPOINTS / "deepseek_v3_core_0_16", output).returncode == 0


def test_a_flipped_bit_in_a_copy_is_found(tmp_path):
    output = export(CHECKPOINTS / "deepseek_v3_core_0_16", tmp_path / "out", "--target", "hf")
    file = next(output.glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    data[8 + length + header["model.layers.2.embed_tokens.weight"]["data_offsets"][0] + 3] ^= 1
    file.write_bytes(data)
    process = run_command("verify", CHECKPOINTS / "deepseek_v3_core_0_16", output)
    assert process.returncode == 4
    assert "model.layers.2.embed_tokens.weight" in process.stdout + process.stderr
