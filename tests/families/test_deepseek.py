"""DeepSeek: what its rules need of the saved arguments, and what they refuse before a weight is read."""

import json
import shutil
from pathlib import Path

import pytest
from support.exports import config_of, export, run_command, tensors_of
from support.torch_dist import change_args

from dist_export import api
from dist_export.api import Source
from dist_export.errors import ExportError
from dist_export.plan.export import ExportPlan
from dist_export.targets.trtllm.tables import EmbeddingSharding
from dist_export.targets.trtllm.target import TrtllmOptions

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


V2, LITE = "deepseek_v2_groups_core_0_16", "deepseek_v2_lite_core_0_16"
NO_ENGINE = (
    "scores experts by softmax and has no bias for choosing among them",
    "no release up to 1.2 has another class",
)


def test_an_engine_is_refused_before_anything_is_written(tmp_path):
    process = run_command("export", CHECKPOINTS / "deepseek_v3_core_0_16", tmp_path / "out")
    assert process.returncode == 2
    assert all(each in process.stderr for each in (*NO_ENGINE, "export it with --target hf")), process.stderr
    assert not (tmp_path / "out").exists()


def planned(checkpoint: Path, **options: object) -> ExportPlan:
    """The plan of an engine's checkpoint, from metadata alone."""
    (plan,) = api.plan_job(api.open_model(Source(checkpoint=checkpoint)), (TrtllmOptions(**options),)).plans
    return plan


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("moonlight_core_0_16_tp2", {"release": "1.2"}, NO_ENGINE[0]),
        ("deepseek_v2_core_0_16", {}, "values are as large as the unrotated part of its keys"),
        (V2, {"release": "0.14"}, "DeepseekV2ForCausalLM is in TensorRT-LLM 0.15, 0.16 to 0.18, not in 0.14"),
        (V2, {"release": "0.19"}, "DeepseekV2ForCausalLM is in TensorRT-LLM 0.15, 0.16 to 0.18, not in 0.19"),
        (LITE, {"release": "0.15"}, r"queries without a latent .V2-Lite. came with 0.16"),
        (V2, {"dtype": "float32"}, "is served in bfloat16, float16, not in float32"),
        (V2, {"embedding": EmbeddingSharding(True, 1)}, "has the whole embedding on every rank"),
        (V2, {"tp_size": 8}, "4 attention heads do not divide by tp 8"),
    ],
)
def test_what_no_engine_serves(name, options, message):
    with pytest.raises(ExportError, match=message):
        planned(CHECKPOINTS / name, **options)


@pytest.mark.parametrize(
    "args, message",
    [
        ({"moe_router_group_topk": 1}, "the class picks groups of experts by their best"),
        ({"moe_router_pre_softmax": False}, "the class takes the softmax over all experts where it picks groups"),
        ({"moe_router_num_groups": None, "moe_router_group_topk": None}, "scales its experts' weights only where"),
        ({"window_size": [4, 0]}, "the class has no attention window"),
        ({"rotary_interleaved": True}, "the class's rotary embeddings are whole"),
    ],
)
def test_what_the_engines_class_does_not_compute(args, message, checkpoint):
    with pytest.raises(ExportError, match=message):
        planned(checkpoint(V2, **args))


@pytest.mark.parametrize(
    "name, args, mode, groups",
    [
        (V2, {}, 3, (4, 2, 2.5)),
        (LITE, {}, 0, (1, 1, 1.0)),
        (LITE, {"moe_router_pre_softmax": False}, 1, (1, 1, 1.0)),
    ],
)
def test_how_the_engine_routes(name, args, mode, groups, checkpoint):
    config = planned(checkpoint(name, **args)).config
    assert (config["moe_renorm_mode"], config["moe"]["normalization_mode"]) == (mode, mode)
    assert (config["moe_n_group"], config["moe_topk_group"], config["moe_routed_scaling_factor"]) == groups
    assert tuple(value for key, value in config["moe"].items() if key.startswith("device_limited")) == groups
    assert config["moe"]["shared_expert_intermediate_size"] == 32
    assert "moe" not in planned(CHECKPOINTS / V2, release="0.15").config


def test_an_engine_without_yarn_is_told_a_factor_of_one(checkpoint):
    args = {"rope_type": "rope", "rotary_scaling_factor": 1.0, "mscale": 1.0, "mscale_all_dim": 0.0}
    assert planned(checkpoint(LITE, **args)).config["rotary_scaling"] == {
        "type": "yarn",
        "factor": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 0.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "original_max_position_embeddings": 64,
    }


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
