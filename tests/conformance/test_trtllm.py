"""Exports equal, byte for byte, what TensorRT-LLM's own converter writes for the same model.

The expected tensors are hashes recorded from that converter (record.py); the checkpoints are real ones
of several Megatron generations and training layouts.
"""

import json
import re
from pathlib import Path

import pytest
import torch
from support.conformance import CHECKPOINTS
from support.exports import config_of, export, fingerprints, tensors_of

HERE = Path(__file__).parent
EXPECTED = {path.stem: json.loads(path.read_text()) for path in sorted((HERE / "expected").glob("*.json"))}
#: Fields in which we may differ: the class name where both load, hints that no loader reads, and nested
#: keys that some release would refuse.
NOT_COMPARED = {
    *("architecture", "gpt_variant", "moe", "layer_types", "num_kv_heads_per_layer"),
    *("logits_type", "runtime_defaults", "rotary_embedding_dim"),
}


def layouts():
    for checkpoint, family in CHECKPOINTS.items():
        for layout in EXPECTED.get(family, {}).get("layouts", ()):  # some have no engine model
            yield pytest.param(HERE / "checkpoints" / checkpoint, family, layout, id=f"{checkpoint}-{layout}")
    for family, expected in EXPECTED.items():
        if "checkpoint" in expected:  # one whose class is another in another release
            for layout in expected["layouts"]:
                checkpoint = HERE / "checkpoints" / expected["checkpoint"]
                yield pytest.param(checkpoint, family, layout, id=f"{family}-{layout}")
        if "options" in expected:
            for layout in expected["layouts"]:
                yield pytest.param(expected["options"], family, layout, id=f"{family}-{layout}")


def check(output: Path, expected: dict) -> None:
    for rank, tensors in enumerate(expected["ranks"]):
        written = fingerprints(output / f"rank{rank}.safetensors")
        if expected["config"].get("share_embedding_table"):  # Gemma: left out there, written by us for later releases
            assert written.pop("lm_head.weight") == tensors["transformer.vocab_embedding.weight"]
        assert written.keys() == tensors.keys()
        different = [name for name in tensors if written[name] != tensors[name]]
        assert not different, [(name, written[name], tensors[name]) for name in different][:3]
    assert not (output / f"rank{len(expected['ranks'])}.safetensors").exists()
    config = config_of(output)
    wanted = {key: value for key, value in expected["config"].items() if key not in NOT_COMPARED}
    if wanted.get("rotary_scaling"):  # the loader takes either name
        scaling = wanted["rotary_scaling"]
        wanted["rotary_scaling"] = {{"rope_type": "type"}.get(key, key): value for key, value in scaling.items()}
    wanted["quantization"].pop("use_meta_recipe", None)  # not taken before 0.15
    if wanted["mapping"]["tp_size"] == 1:
        del wanted["use_parallel_embedding"]  # says nothing there
    assert {key: config.get(key) for key in wanted} == wanted


@pytest.mark.parametrize("checkpoint, family, layout", list(layouts()))
def test_every_tensor_and_field_equals_the_consumers_own_conversion(
    checkpoint, family, layout, tmp_path, megatron_checkpoint
):
    if isinstance(checkpoint, dict):
        checkpoint = megatron_checkpoint(**checkpoint)
    tp, pp, ep = re.fullmatch(r"tp(\d+)pp(\d+)(?:ep(\d+))?", layout).groups(default="1")
    release = EXPECTED[family].get("release")  # of the converter, where the class changed later
    version = ("--trtllm-version", release) if release else ()
    output = export(checkpoint, tmp_path / "out", "--tp", tp, "--pp", pp, "--moe-ep", ep, *version)
    check(output, EXPECTED[family]["layouts"][layout])


@pytest.mark.parametrize("num_processes", [1, 3, 6])
def test_the_number_of_processes_does_not_change_a_byte(num_processes, tmp_path):
    checkpoint = HERE / "checkpoints" / "llama_core_0_16_tp2pp2"
    output = export(checkpoint, tmp_path / "out", "--tp", 2, "--pp", 2, "--num-processes", num_processes)
    check(output, EXPECTED["llama"]["layouts"]["tp2pp2"])


def test_expert_parallel_ranks_recombine_to_the_same_experts(tmp_path):
    """moe_tp x moe_ep = tp: ep is the faster axis, whole experts go to ep ranks, each cut moe_tp ways."""
    checkpoint = HERE / "checkpoints" / "mixtral_core_0_16_pp2ep2"
    whole = tensors_of(export(checkpoint, tmp_path / "whole") / "rank0.safetensors")
    output = export(checkpoint, tmp_path / "ep", "--tp", 4, "--moe-ep", 2)
    ranks = [tensors_of(output / f"rank{rank}.safetensors") for rank in range(4)]
    mapping = config_of(output)["mapping"]
    assert (mapping["moe_tp_size"], mapping["moe_ep_size"]) == (2, 2)
    for name in ("transformer.layers.0.mlp.fc.weight", "transformer.layers.3.mlp.proj.weight"):
        experts = []
        for ep_rank in range(2):
            shards = [ranks[moe_tp_rank * 2 + ep_rank][name] for moe_tp_rank in range(2)]
            if name.endswith("fc.weight"):  # [experts, up shard + gate shard, hidden]
                halves = [shard.chunk(2, dim=1) for shard in shards]
                experts.append(torch.cat([half[0] for half in halves] + [half[1] for half in halves], dim=1))
            else:
                experts.append(torch.cat(shards, dim=2))
        assert torch.equal(torch.cat(experts), whole[name])
