"""Mistral, Qwen and Mixtral: what they compute, which releases serve them, what is refused before a weight is read."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from support.exports import config_of, export, run_command, tensors_of
from support.megatron_checkpoints import reference_weights
from support.small_models import model_config
from support.torch_dist import change_args, write_torch_dist

from dist_export.errors import ExportError
from dist_export.families.qwen2_moe import shared_divides
from dist_export.families.registry import choose_family
from dist_export.plan.layout import TargetLayout

CHECKPOINTS = Path(__file__).parents[1] / "conformance" / "checkpoints"
MOE = {"num_experts": 4, "moe_top_k": 2, "moe_ffn_hidden_size": 64}
SHARED = {"moe_shared_expert_ffn_hidden_size": 64, "moe_shared_expert_gate": True}
MEASURED = 5e-5
"""Above what equal weights show in these models: 3e-6, and 2e-5 in the larger Mixtral."""


def checkpoint_of(family: str) -> Path:
    return CHECKPOINTS / ("mixtral_core_0_16_pp2ep2" if family == "mixtral" else f"{family}_core_0_16_tp2")


@pytest.fixture
def changed(tmp_path):
    """A copy of a checkpoint with other arguments."""

    def copy(family: str, **args: object) -> Path:
        folder = tmp_path / "checkpoint"
        shutil.copytree(checkpoint_of(family), folder)
        change_args(folder / "iter_0000010", **args)
        return folder

    return copy


def refusal(*command: object) -> str:
    process = run_command("export", *command)
    assert process.returncode == 2, process.stdout
    return process.stderr


@pytest.mark.parametrize(
    ("fields", "family"),
    [
        ({}, "llama"),
        ({"qkv_bias": True}, "qwen2"),
        ({"qkv_bias": True, "linear_bias": True}, "llama"),
        ({"qk_norm": True}, "qwen3"),
        ({"window_size": 15}, "mistral"),
        (MOE, "mixtral"),
        (MOE | {"qk_norm": True}, "qwen3-moe"),
        (MOE | SHARED | {"qkv_bias": True}, "qwen2-moe"),
    ],
)
def test_the_family_of_a_model(fields, family):
    assert choose_family(model_config(**fields)).name == family


@pytest.mark.parametrize(
    ("fields", "family"), [({}, "mistral"), ({"qkv_bias": True}, "llama"), ({"window_size": 15}, "llama")]
)
def test_a_model_of_two_families_is_of_the_one_named(fields, family):
    assert choose_family(model_config(**fields), family).name == family


def test_a_llama_exported_as_mistral_has_no_window(tmp_path):
    output = export(checkpoint_of("llama_3_2"), tmp_path / "out", "--target", "hf", "--family", "mistral",
                    "--set", "rope_scaling=none")  # fmt: skip
    config = config_of(output)
    assert (config["architectures"], config["sliding_window"]) == (["MistralForCausalLM"], None)


@pytest.mark.parametrize(
    ("family", "options", "reason"),
    [
        ("qwen3", ("--trtllm-version", "0.21"), "the class is in TensorRT-LLM 1.0 to 1.2, not in 0.21"),
        ("qwen3_moe", ("--trtllm-version", "1.0"), "the class is in TensorRT-LLM 1.1 to 1.2, not in 1.0"),
        ("qwen2_moe", ("--tp", 3), "8 attention heads do not divide by tp 3"),
        ("qwen2_moe", ("--tp", 2, "--moe-ep", 3), "moe ep 3"),
    ],
)
def test_releases_and_layouts_that_cannot_serve_it(family, options, reason, tmp_path):
    assert reason in refusal(checkpoint_of(family), tmp_path / "out", *options)


@pytest.mark.parametrize(
    ("family", "args", "options", "reason"),
    [
        ("qwen2", {"window_size": (15, 0)}, ("--target", "hf"), "disagree about which layers max_window_layers"),
        ("qwen2_moe", {"moe_router_topk_scaling_factor": 2.5}, (), "not qwen2-moe: the router scales its weights"),
        ("qwen3_moe", {"moe_router_score_function": "sigmoid"}, (), "not qwen3-moe: the router scores by sigmoid"),
        ("mistral", {"use_rope_scaling": True}, ("--target", "hf"), "rotary scaling is not expressible"),
    ],
)
def test_what_the_class_does_not_compute_is_refused(family, args, options, reason, changed, tmp_path):
    assert reason in refusal(changed(family, **args), tmp_path / "out", *options)


def test_a_shared_expert_without_a_gate_is_refused():
    fields = MOE | SHARED | {"moe_shared_expert_gate": False, "qkv_bias": True}
    with pytest.raises(ExportError, match="its shared experts have no gate") as error:
        choose_family(model_config(**fields))
    assert "not mixtral: it has biases; it has shared experts" in str(error.value)


def test_a_shared_expert_must_divide_by_tp():
    fields = {"num_attention_heads": 16, "num_query_groups": 16}
    model = model_config(**fields, **MOE, **SHARED | {"moe_shared_expert_ffn_hidden_size": 40})
    assert shared_divides(model, TargetLayout(8, 1, (model.num_layers,)))
    assert not shared_divides(model, TargetLayout(16, 1, (model.num_layers,)))


def test_the_shared_expert_moved_into_the_mlp_in_0_16(tmp_path):
    checkpoint = checkpoint_of("qwen2_moe")
    before = export(checkpoint, tmp_path / "before", "--tp", 2, "--trtllm-version", "0.15")
    after = export(checkpoint, tmp_path / "after", "--tp", 2)
    for rank in range(2):
        old, new = (tensors_of(folder / f"rank{rank}.safetensors") for folder in (before, after))
        renamed = {name.replace(".shared_expert", ".mlp.shared_expert"): tensor for name, tensor in old.items()}
        assert renamed.keys() == new.keys() != old.keys()
        assert all((renamed[name] == new[name]).all() for name in new)
    assert config_of(before) == config_of(after)
    assert run_command("verify", checkpoint, after).returncode == 0


def test_the_routers_softmax_is_told_to_both_consumers(changed, tmp_path):
    checkpoint = changed("qwen3_moe", moe_router_pre_softmax=True)
    assert config_of(export(checkpoint, tmp_path / "hf", "--target", "hf"))["norm_topk_prob"] is False
    assert config_of(export(checkpoint, tmp_path / "trtllm"))["moe"]["normalization_mode"] == 0
    plain = export(checkpoint_of("qwen3_moe"), tmp_path / "plain")
    assert config_of(plain)["moe"]["normalization_mode"] == 1


def test_the_engines_own_epsilon_is_told(tmp_path):
    process = run_command("export", checkpoint_of("qwen3"), tmp_path / "out")
    assert "queries and keys were normed with epsilon 1e-06; TensorRT-LLM's class norms them with 1e-05" in (
        process.stdout + process.stderr
    )


def engine_and_hub(family: str) -> list[tuple[object, ...]]:
    moe = "moe" in family or family == "mixtral"
    return [("--tp", 4, "--moe-ep", 2) if moe else ("--tp", 4), ("--target", "hf")]


CASES = [(family, options) for family in ("mistral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "llama_3_2", "mixtral")
         for options in engine_and_hub(family)]  # fmt: skip


@pytest.mark.parametrize(("family", "options"), CASES, ids=lambda value: "".join(map(str, value)))
def test_an_export_computes_the_checkpoints_model(family, options, tmp_path):
    pytest.importorskip("megatron.core")
    pytest.importorskip("transformers")
    from dist_export.verify.logits import verify_logits

    checkpoint = checkpoint_of(family)
    report = verify_logits(checkpoint, export(checkpoint, tmp_path / "out", *options))
    assert report.agrees, str(report)
    assert report.difference.relative_difference < MEASURED
    assert max(state.relative for state in report.states) < MEASURED


def test_transformers_counts_the_window_as_megatron_does(tmp_path):
    """Sequences longer than the window: a token too many or too few would show."""
    pytest.importorskip("megatron.core")
    pytest.importorskip("transformers")
    from dist_export.verify.logits import verify_logits

    checkpoint = checkpoint_of("mistral")
    output = export(checkpoint, tmp_path / "out", "--target", "hf")
    assert config_of(output)["sliding_window"] == 16
    report = verify_logits(checkpoint, output, tokens=[list(range(32))])
    assert report.difference.num_tokens == 32
    assert report.difference.relative_difference < MEASURED


@pytest.mark.parametrize("options", [("--tp", 2), ("--target", "hf")], ids=["trtllm", "hf"])
def test_a_float32_router_is_rounded_for_one_consumer_only(options, tmp_path):
    pytest.importorskip("megatron.core")
    pytest.importorskip("transformers")
    import torch

    from dist_export.verify.logits import verify_logits

    source = checkpoint_of("qwen2_moe") / "iter_0000010"
    weights = reference_weights(source)
    for name, weight in weights.items():
        if name.endswith("router.weight"):
            weights[name] = weight.float() * (1 + torch.linspace(-1e-3, 1e-3, weight.shape[-1]))
    args = vars(torch.load(source / "common.pt", weights_only=False)["args"])
    checkpoint = write_torch_dist(tmp_path / "checkpoint", weights, args=args)
    report = verify_logits(checkpoint, export(checkpoint, tmp_path / "out", *options))
    assert report.agrees, str(report)
    assert report.difference.relative_difference < MEASURED
    assert report.from_training is not None
    assert (report.from_training.relative_difference > 1e-4) == ("hf" in options)


def swap_halves(tensors):
    name = "transformer.layers.1.mlp.fc.weight"
    tensors[name] = tensors[name].roll(tensors[name].shape[1] // 2, 1)


def swap_experts(tensors):
    name = "transformer.layers.1.mlp.proj.weight"
    tensors[name] = tensors[name].flip(0)


def swap_routes(tensors):
    name = "transformer.layers.1.mlp.router.weight"
    tensors[name] = tensors[name].flip(0)


def weaken_shared_expert(tensors):
    tensors["transformer.layers.1.mlp.shared_expert_gate.weight"] *= -1


@pytest.mark.parametrize(
    ("fault", "place"),
    [
        (swap_halves, r"MLP output .* \[transformer.layers.1.mlp.router, mlp.fc, mlp.proj, shared_expert in rank0"),
        (swap_experts, "MLP output"),
        (swap_routes, "router .*mlp.router"),
        (weaken_shared_expert, "MLP output"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_logits_name_the_place_of_a_fault_in_the_experts(fault, place, tmp_path):
    pytest.importorskip("megatron.core")
    from safetensors.torch import save_file

    from dist_export.verify.logits import verify_logits

    checkpoint = checkpoint_of("qwen2_moe")
    output = export(checkpoint, tmp_path / "out")
    path = output / "rank0.safetensors"
    tensors = {name: tensor.clone() for name, tensor in tensors_of(path).items()}
    fault(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    report = verify_logits(checkpoint, output)
    assert not report.agrees
    assert report.first_difference is not None
    assert report.first_difference.point.layer == 1
    assert re.search(f"differ from layer 1, {place}", str(report)), str(report)
