"""Every rule that turns saved arguments and shapes into a configuration, on real checkpoints' arguments."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Any

import pytest
from recorded_arguments import ABSENT, GPT2, LAYER, LLAMA, LLAMA_MAIN, MIXTRAL, NAMES, Checkpoint

from dist_export.errors import ExportError
from dist_export.models.config import ModelConfig, RopeScaling
from dist_export.models.refusals import REFUSALS

LLAMA_CONFIG = ModelConfig(
    num_layers=4,
    hidden_size=64,
    ffn_hidden_size=128,
    num_attention_heads=8,
    num_query_groups=2,
    head_size=8,
    activation="silu",
    gated=True,
    normalization="RMSNorm",
    zero_centered_norm=False,
    norm_epsilon=1e-5,
    linear_bias=False,
    qkv_bias=False,
    position_embedding="rope",
    max_position_embeddings=64,
    tied_embeddings=False,
    padded_vocab_size=256,
    vocab_size=250,
)
GPT2_CHANGES: dict[str, Any] = {
    "num_query_groups": 8,
    "activation": "gelu",
    "gated": False,
    "normalization": "LayerNorm",
    "linear_bias": True,
    "qkv_bias": True,
    "position_embedding": "learned_absolute",
    "tied_embeddings": True,
}
MIXTRAL_CHANGES = {"num_experts": 4, "moe_top_k": 2, "moe_ffn_hidden_size": 128, "rotary_base": 1e6}


@pytest.mark.parametrize(
    ("name", "changes"),
    [(LLAMA, {}), (LLAMA_MAIN, {}), (GPT2, GPT2_CHANGES), (MIXTRAL, MIXTRAL_CHANGES)],
)
def test_real_arguments_give_the_model_that_was_trained(name: str, changes: dict[str, Any]) -> None:
    resolved = Checkpoint(name).resolve()
    expected = {name: getattr(LLAMA_CONFIG, name) for name in ModelConfig.__struct_fields__} | changes
    assert resolved.config == ModelConfig(**expected)
    assert list(resolved.provenance) == list(ModelConfig.__struct_fields__)
    assert all(resolved.provenance.values())


@pytest.mark.parametrize("name", NAMES)
def test_real_arguments_need_no_default(name: str) -> None:
    provenance = Checkpoint(name).resolve().provenance
    assert {field: source for field, source in provenance.items() if "default" in source} == {}


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [
        # Names that changed between releases.
        (LLAMA, {"layernorm_epsilon": ABSENT, "norm_epsilon": 1e-6}, {"norm_epsilon": 1e-6}),
        (LLAMA, {"layernorm_epsilon": 1e-6}, {"norm_epsilon": 1e-6}),
        (LLAMA, {"layernorm_zero_centered_gamma": ABSENT, "apply_layernorm_1p": True}, {"zero_centered_norm": True}),
        (LLAMA, {"layernorm_zero_centered_gamma": True}, {"zero_centered_norm": True}),
        (LLAMA, {"layernorm_zero_centered_gamma": ABSENT}, {"zero_centered_norm": False}),
        (LLAMA, {"add_bias_linear": ABSENT, "disable_bias_linear": True}, {"linear_bias": False}),
        (GPT2, {"add_bias_linear": ABSENT, "disable_bias_linear": False}, {"linear_bias": True, "qkv_bias": True}),
        (
            LLAMA,
            {"untie_embeddings_and_output_weights": ABSENT, "share_embeddings_and_output_weights": False},
            {"tied_embeddings": False},
        ),
        (MIXTRAL, {"num_experts": ABSENT, "num_moe_experts": 4}, {"num_experts": 4}),
        # Groups mean nothing without the switch.
        (GPT2, {"group_query_attention": False, "num_query_groups": 1}, {"num_query_groups": 8}),
        (GPT2, {"group_query_attention": ABSENT, "num_query_groups": ABSENT}, {"num_query_groups": 8}),
        (LLAMA, {"group_query_attention": ABSENT, "num_query_groups": 2}, {"num_query_groups": 2}),
        # Sizes that Megatron computes when they are not saved.
        (LLAMA, {"kv_channels": None}, {"head_size": 8}),
        (LLAMA, {"ffn_hidden_size": None}, {"ffn_hidden_size": 128}),
        (MIXTRAL, {"moe_ffn_hidden_size": None}, {"moe_ffn_hidden_size": 128}),
        # Activations.
        (GPT2, {"bias_gelu_fusion": True}, {"activation": "gelu_tanh", "gated": False}),
        (GPT2, {"bias_gelu_fusion": ABSENT}, {"activation": "gelu_tanh"}),
        (GPT2, {"bias_gelu_fusion": False}, {"activation": "gelu"}),
        (GPT2, {"squared_relu": True}, {"activation": "squared_relu", "gated": False}),
        (GPT2, {"openai_gelu": True, "use_legacy_models": True}, {"activation": "gelu_tanh"}),
        (GPT2, {"openai_gelu": True}, {"activation": "gelu"}),
        (
            GPT2,
            {"onnx_safe": True, "bias_gelu_fusion": True, "use_legacy_models": ABSENT, "use_mcore_models": False},
            {"activation": "gelu"},
        ),
        (  # Older than Megatron-Core models: Megatron-LM's own model has the tanh form.
            GPT2,
            {"openai_gelu": True, **dict.fromkeys(("use_legacy_models", "use_mcore_models", "normalization"), ABSENT)},
            {"activation": "gelu_tanh", "normalization": "LayerNorm"},
        ),
        (LLAMA, {"swiglu": False, "quick_geglu": True}, {"activation": "quick_gelu", "gated": True}),
        (
            LLAMA,
            {"swiglu": False, "gated_linear_unit": True, "activation_func": "torch.nn.functional.gelu"},
            {"activation": "gelu", "gated": True},
        ),
        (
            LLAMA,
            {
                "swiglu": False,
                "gated_linear_unit": True,
                "activation_func": "gelu",
                "bias_activation_fusion": True,
            },
            {"activation": "gelu_tanh", "gated": True},
        ),
        (
            LLAMA,
            {"swiglu": False, "gated_linear_unit": True, "bias_gelu_fusion": True},
            {"activation": "gelu_tanh", "gated": True},
        ),
        # Positions.
        (
            LLAMA,
            {"position_embedding_type": ABSENT, "use_rotary_position_embeddings": True},
            {"position_embedding": "rope"},
        ),
        (GPT2, {"position_embedding_type": ABSENT}, {"position_embedding": "learned_absolute"}),
        (LLAMA, {"position_embedding_type": "none"}, {"position_embedding": "none", "rope_scaling": None}),
        (LLAMA, {"rotary_base": 500000}, {"rotary_base": 500000.0}),
        (LLAMA, {"rotary_base": ABSENT}, {"rotary_base": 10000.0}),
        (
            LLAMA,
            {"rotary_percent": 0.5, "rotary_interleaved": True},
            {"rotary_percent": 0.5, "rotary_interleaved": True},
        ),
        (LLAMA, {"rotary_seq_len_interpolation_factor": 4}, {"rope_scaling": RopeScaling("linear", 4.0)}),
        (LLAMA, {"use_rope_scaling": True}, {"rope_scaling": RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)}),
        (
            LLAMA,
            {"use_rope_scaling": True, "rope_scaling_factor": ABSENT},
            {"rope_scaling": RopeScaling("llama3", 8.0)},
        ),
        (LLAMA, {"use_rope_scaling": True, "rope_scaling_factor": 32}, {"rope_scaling": RopeScaling("llama3", 32.0)}),
        (LLAMA, {"window_size": [127, 0]}, {"window_size": 127}),
        (LLAMA, {"window_size": [-1, -1]}, {"window_size": None}),
        # Windows in some layers, and what NeMo and Megatron-Bridge have beyond Megatron-LM.
        (LLAMA, {"window_size": [7, 0], "window_attn_skip_freq": 3}, {"window_layers": (1, 1, 0, 1)}),
        (LLAMA, {"window_size": [7, 0], "window_attn_skip_freq": [0, 1, 1, 0]}, {"window_layers": (0, 1, 1, 0)}),
        (LLAMA, {"window_size": None, "window_attn_skip_freq": 3}, {"window_layers": None}),
        (LLAMA, {"window_size": [7, 0], "attn_logit_softcapping": 50.0}, {"window_layers": (1, 0, 1, 0)}),
        (LLAMA, {"attn_logit_softcapping": 50.0}, {"attn_logit_softcapping": 50.0, "window_layers": None}),
        (LLAMA, {"final_logit_softcapping": 0.0}, {"final_logit_softcapping": None}),
        (LLAMA, {"query_pre_attn_scalar": 144}, {"query_pre_attn_scalar": 144.0}),
        (LLAMA, {"apply_embedding_scaling": True}, {"embedding_scaling": True}),
        (LLAMA, {"parallel_attention": True}, {"parallel_attention": True, "separate_mlp_norm": False}),
        (LLAMA, {"new_decoder_architecture": True}, {"parallel_attention": True, "separate_mlp_norm": True}),
        (LLAMA, {"parallel_attention": False, "new_decoder_architecture": False}, {"parallel_attention": False}),
        # Experts.
        (MIXTRAL, {"moe_router_topk": ABSENT}, {"moe_top_k": 2}),
        (
            MIXTRAL,
            {"moe_mlp_glu_interleave_size": 32, "moe_grouped_gemm": True, "expert_tensor_parallel_size": 2},
            {"moe_glu_interleave_size": 32, "moe_glu_interleave_num_shards": 2},
        ),
        (  # SequentialMLP knows nothing of it.
            MIXTRAL,
            {"moe_mlp_glu_interleave_size": 32, "moe_grouped_gemm": False, "expert_tensor_parallel_size": 2},
            {"moe_glu_interleave_size": 0, "moe_glu_interleave_num_shards": 1},
        ),
        (MIXTRAL, {"moe_layer_freq": 1}, {"moe_layer_freq": None}),
        (MIXTRAL, {"moe_layer_freq": 2}, {"moe_layer_freq": (1, 0, 1, 0)}),
        (MIXTRAL, {"moe_layer_freq": [0, 1, 1, 1]}, {"moe_layer_freq": (0, 1, 1, 1)}),
        (MIXTRAL, {"moe_layer_freq": [1, 1, 1, 1]}, {"moe_layer_freq": None}),
        (
            MIXTRAL,
            {
                "moe_router_topk": 1,
                "moe_router_pre_softmax": True,
                "moe_router_score_function": "sigmoid",
                "moe_router_num_groups": 2,
                "moe_router_group_topk": 1,
                "moe_router_topk_scaling_factor": 2.5,
            },
            {
                "moe_top_k": 1,
                "moe_router_pre_softmax": True,
                "moe_router_score_function": "sigmoid",
                "moe_router_num_groups": 2,
                "moe_router_group_top_k": 1,
                "moe_router_scaling_factor": 2.5,
            },
        ),
        (LLAMA, {"moe_router_topk": 2, "moe_ffn_hidden_size": 64}, {"moe_top_k": 0, "moe_ffn_hidden_size": 0}),
    ],
)
def test_argument_rules(name: str, changes: dict[str, object], expected: dict[str, object]) -> None:
    config = Checkpoint(name).args(**changes).resolve().config
    assert {field: getattr(config, field) for field in expected} == expected


@pytest.mark.parametrize(
    ("function", "activation"),
    [
        *(("torch.nn.functional.gelu", "gelu"), ("megatron.core.transformer.utils.erf_gelu", "gelu")),
        *(("megatron.core.activations.fast_gelu", "gelu_tanh"), ("openai_gelu", "gelu_tanh")),
        *(("gelu_pytorch_tanh", "gelu_tanh"), ("gelu_tanh", "gelu_tanh"), ("openai_gelu_func", "gelu_tanh")),
        *(("torch.nn.functional.silu", "silu"), ("swish", "silu"), ("torch.nn.functional.relu", "relu")),
        *(("megatron.core.activations.squared_relu", "squared_relu"), ("relu2", "squared_relu")),
        ("megatron.core.activations.quick_gelu", "quick_gelu"),
    ],
)
def test_functions_of_a_transformer_config(function: str, activation: str) -> None:
    """What each computes: exact gelu by the error function, the tanh forms, x sigmoid(x), x sigmoid(1.702 x), ..."""
    assert Checkpoint(LLAMA).args(swiglu=False, gated_linear_unit=True, activation_func=function).value(
        "activation"
    ) == (activation)


@pytest.mark.parametrize(("hidden", "swiglu", "expected"), [(64, False, 256), (64, True, 128), (4096, True, 10880)])
def test_ffn_default_is_megatrons(hidden: int, swiglu: bool, expected: int) -> None:
    checkpoint = Checkpoint(GPT2)
    checkpoint.shapes = {}
    checkpoint.args(hidden_size=hidden, ffn_hidden_size=None, swiglu=swiglu, kv_channels=8, num_attention_heads=8)
    resolved = checkpoint.resolve()
    assert resolved.config.ffn_hidden_size == expected
    assert resolved.provenance["ffn_hidden_size"].startswith("Megatron default")


def test_head_size_need_not_divide_hidden_size() -> None:
    checkpoint = Checkpoint(LLAMA).args(kv_channels=16)
    checkpoint.shape({LAYER + "self_attention.linear_proj.weight": (64, 128)})
    checkpoint.shape({LAYER + "self_attention.linear_qkv.weight": (192, 64)})
    assert checkpoint.value("head_size") == 16


def test_shapes_give_what_the_release_did_not_save() -> None:
    checkpoint = Checkpoint(MIXTRAL).args(moe_shared_expert_gate=ABSENT, moe_shared_expert_intermediate_size=96)
    shared = LAYER + "mlp.shared_experts."
    checkpoint.shape({shared + "linear_fc1.weight": (192, 64), shared + "linear_fc2.weight": (64, 96)})
    checkpoint.shape({shared + "gate_weight": (1, 64)})
    resolved = checkpoint.resolve()
    assert resolved.config.moe_shared_expert_ffn_hidden_size == 96
    assert resolved.config.moe_shared_expert_gate
    assert resolved.provenance["moe_shared_expert_gate"] == f"tensor present: {shared}gate_weight"


def test_gate_and_up_as_two_tensors() -> None:
    fc1 = LAYER + "mlp.linear_fc1.weight"
    checkpoint = Checkpoint(LLAMA).shape({fc1: ABSENT, fc1 + "_w": (128, 64), fc1 + "_v": (128, 64)})
    assert checkpoint.resolve().config == LLAMA_CONFIG


# --- true and padded vocabulary ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "size", "source"),
    [
        ({}, 250, "checkpoint args: vocab_size + 1 (NullTokenizer)"),
        ({"tokenizer_type": "NullMultimodalTokenizer"}, 250, "checkpoint args: vocab_size + 1 (NullTokenizer)"),
        ({"tokenizer_type": "TikTokenizer"}, 249, "checkpoint args: vocab_size, tokenizer_type"),
        ({"null_tokenizer_eod_id": None, "vocab_size": 256}, 256, "checkpoint args: vocab_size (NullTokenizer)"),
    ],
)
def test_proven_vocabulary(changes: dict[str, object], size: int, source: str) -> None:
    resolved = Checkpoint(LLAMA).args(**changes).resolve()
    assert (resolved.config.vocab_size, resolved.config.padded_vocab_size) == (size, 256)
    assert resolved.provenance["vocab_size"] == source
    assert resolved.notes == ()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"tokenizer_type": "HuggingFaceTokenizer", "vocab_size": 250}, "vocab_size = 250 .* is not used by HuggingF"),
        ({"tokenizer_type": "Llama2Tokenizer", "vocab_size": None}, r"that of the tokenizer \(Llama2Tokenizer\)"),
        ({"vocab_size": 100}, "give 101, which pads to 128 .multiple of 32., not to the 256 rows"),
        ({"vocab_size": 256}, "give 257, which pads to 288"),
    ],
)
def test_unproven_vocabulary_stays_padded_and_says_so(changes: dict[str, object], reason: str) -> None:
    resolved = Checkpoint(LLAMA).args(**changes).resolve()
    assert resolved.config.vocab_size == resolved.config.padded_vocab_size == 256
    (note,) = resolved.notes
    assert "padded size 256 is kept" in note
    assert "--vocab-size" in note
    assert re.search(reason, note)


def test_null_tokenizer_of_new_releases_keeps_the_larger_reading() -> None:
    resolved = Checkpoint(LLAMA_MAIN).resolve()
    assert resolved.config.vocab_size == 250
    assert "--vocab-size 249" in resolved.notes[0]
    assert Checkpoint(LLAMA_MAIN).set("vocab_size=249").resolve().notes == ()


def test_a_provider_s_vocabulary_must_pad_to_the_rows_that_are_there() -> None:
    """Megatron-Bridge: 100 tokens that are not padded to 128 but have 256 rows prove nothing."""
    rows = {"make_vocab_size_divisible_by": 128, "tensor_model_parallel_size": 1}
    resolved = Checkpoint(LLAMA).args(vocab_size=100, should_pad_vocab=True, **rows).resolve()
    assert resolved.config.vocab_size == 256
    assert "pads to 128 (multiple of 128), not to the 256 rows" in resolved.notes[0]
    assert Checkpoint(LLAMA).args(vocab_size=200, should_pad_vocab=True, **rows).value("vocab_size") == 200
    assert Checkpoint(LLAMA).args(vocab_size=256, should_pad_vocab=False, **rows).value("vocab_size") == 256


def test_rows_of_the_embedding_beat_the_saved_padding() -> None:
    checkpoint = Checkpoint(LLAMA).shape(
        {"embedding.word_embeddings.weight": (512, 64), "output_layer.weight": (512, 64)}
    )
    resolved = checkpoint.resolve()
    assert (resolved.config.padded_vocab_size, resolved.config.vocab_size) == (512, 250)
    assert resolved.notes[0].startswith("padded_vocab_size: 512 of tensor shape")


def test_vocabulary_above_the_rows_is_an_error() -> None:
    with pytest.raises(ExportError, match=r"(?s)vocab_size 300 is above padded_vocab_size 256.*command line"):
        Checkpoint(LLAMA).set("vocab_size=300").resolve()


# --- overrides and precedence -----------------------------------------------------------------------------


def test_an_override_replaces_an_argument_and_says_so() -> None:
    resolved = Checkpoint(LLAMA).set("norm_epsilon=1e-6", "rope_scaling=llama3:32").resolve()
    assert resolved.config.norm_epsilon == 1e-6
    assert resolved.config.rope_scaling == RopeScaling("llama3", 32.0)
    assert resolved.provenance["norm_epsilon"] == "command line"
    assert resolved.notes[0] == (
        "norm_epsilon: 1e-06 (command line) replaces 1e-05 (checkpoint args: layernorm_epsilon)"
    )


def test_an_override_may_correct_an_argument_that_shapes_contradict() -> None:
    resolved = Checkpoint(LLAMA).args(hidden_size=128).set("hidden_size=64").resolve()
    assert resolved.config == LLAMA_CONFIG


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("hidden_size=128", "hidden_size: command line says 128, tensor shape: .* proves 64; correct or drop"),
        ("qkv_bias=true", "qkv_bias: command line says true, tensor absent: .*linear_qkv.bias proves false"),
        ("num_attention_heads=16", r"num_attention_heads 16 \(command line\).* make 128 columns"),
        ("head_size=16", r"head_size 16 \(command line\).* make 128 columns"),
        ("num_query_groups=4", r"num_query_groups 4 \(command line\).* make 128 rows, but .*linear_qkv"),
        ("attention_output_gate=true", r"attention_output_gate \(command line\): no target computes it"),
    ],
)
def test_an_override_against_the_tensors_is_an_error(setting: str, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        Checkpoint(LLAMA).set(setting).resolve()


def test_unknown_override_fields_are_an_error() -> None:
    checkpoint = Checkpoint(LLAMA)
    checkpoint.overrides["hiddensize"] = (64, "file a.yaml")
    with pytest.raises(ExportError, match=r"file a.yaml: .* 'hiddensize'; did you mean hidden_size"):
        checkpoint.resolve()


# --- contradictions ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (LLAMA, {"num_layers": 6}, "num_layers: checkpoint args: num_layers says 6, decoder layers found .4. proves 4"),
        (
            LLAMA,
            {"hidden_size": 128},
            "hidden_size: .* says 128, .*word_embeddings.weight .256, 64. proves 64; .*--set",
        ),
        (LLAMA, {"ffn_hidden_size": 256}, "ffn_hidden_size: .* says 256, .*linear_fc2.weight .64, 128. proves 128"),
        (LLAMA, {"swiglu": False}, "gated: .* says false, .*linear_fc1.weight .256, 64. proves true"),
        (GPT2, {"swiglu": True}, "gated: .* says true, .* proves false"),
        (
            LLAMA,
            {"normalization": "LayerNorm"},
            "says LayerNorm, tensor absent: decoder.final_layernorm.bias proves RMS",
        ),
        (LLAMA, {"add_bias_linear": True}, "linear_bias: .* says true, tensor absent: .*linear_proj.bias proves false"),
        (
            LLAMA,
            {"untie_embeddings_and_output_weights": False},
            "tied_embeddings: .* tensor present: output_layer.weight",
        ),
        (
            GPT2,
            {"position_embedding_type": "rope"},
            "position_embedding: .* says rope, tensor present: .* proves learned",
        ),
        (LLAMA, {"position_embedding_type": "learned_absolute"}, "says learned_absolute, but there is no tensor"),
        (LLAMA, {"qk_layernorm": True}, "qk_norm: .* says true, tensor absent: .*q_layernorm.weight proves false"),
        (LLAMA, {"num_attention_heads": 16}, "make 128 columns, but .*linear_proj.weight is .64, 64."),
        (LLAMA, {"num_query_groups": 8}, "make 192 rows, but .*linear_qkv.weight is .96, 64."),
        (LLAMA, {"group_query_attention": False}, "make 192 rows, but .*linear_qkv.weight is .96, 64."),
        (MIXTRAL, {"num_experts": None}, "num_experts: .* says 0, .*router.weight .4, 64. proves 4"),
        (LLAMA, {"num_experts": 4}, "num_experts: .* says 4, tensor absent: .*router.weight proves 0"),
        (MIXTRAL, {"moe_ffn_hidden_size": 96}, "moe_ffn_hidden_size: .* says 96, .* proves 128"),
        (MIXTRAL, {"moe_router_enable_expert_bias": True}, "moe_router_expert_bias: .* tensor absent: .*expert_bias"),
        (GPT2, {"max_position_embeddings": 128}, "max_position_embeddings: .* says 128, .* proves 64"),
        (LLAMA, {"norm_epsilon": 1e-6}, "contradict each other: layernorm_epsilon = 1e-05, norm_epsilon = 1e-06"),
        (LLAMA, {"squared_relu": True}, "args set swiglu and squared_relu"),
        (LLAMA, {"num_layers": None}, "num_layers is not set, as in hybrid models"),
        (LLAMA, {"layernorm_epsilon": ABSENT}, "do not say and the tensor shapes do not prove norm_epsilon"),
        (LLAMA, {"window_size": [127, 5]}, "window_size .127, 5. is not .left, 0."),
        (LLAMA, {"position_embedding_type": "sinusoidal"}, "position_embedding is 'sinusoidal', must be one of"),
        (LLAMA, {"activation_func": "snake"}, "activation_func 'snake' is not known"),
    ],
)
def test_contradictions_stop_the_run(name: str, changes: dict[str, object], message: str) -> None:
    if "activation_func" in changes:
        changes = changes | {"swiglu": False}
    with pytest.raises(ExportError, match=message):
        Checkpoint(name).args(**changes).resolve()


def test_norms_of_queries_are_as_long_as_a_head() -> None:
    norms = {LAYER + f"self_attention.{part}_layernorm.weight": (16,) for part in "qk"}
    with pytest.raises(ExportError, match=r"head_size 8 .* make 8 rows, but .*q_layernorm.weight is \(16,\)"):
        Checkpoint(LLAMA).args(qk_layernorm=True).shape(norms).resolve()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({LAYER + "mlp.linear_fc1.weight": (200, 64)}, "has 200 rows, expected 128 or 256"),
        ({LAYER + "mlp.linear_fc1.weight": (64,)}, r"has shape \(64,\), expected 2 dims"),
        (
            {LAYER + "self_attention.linear_proj.bias": (64,)},
            "linear_proj.bias are present, but .*linear_fc1.* have no",
        ),
        ({"output_layer.weight": (256, 32)}, r"dim 1 of output_layer.weight is \(256, 32\)\[1\]"),
    ],
)
def test_shapes_that_disagree_are_an_error(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ExportError, match=message):
        Checkpoint(LLAMA).shape(changes).resolve()


def test_everything_wrong_comes_in_one_error() -> None:
    checkpoint = Checkpoint(LLAMA).args(num_layers=6, hidden_size=128, use_mup=True, rotary_base="big")
    with pytest.raises(ExportError, match=r"(?s)4 faults.*use_mup.*rotary_base is 'big'.*num_layers.*hidden_size"):
        checkpoint.resolve()


class Inert:
    """Stands where a checkpoint held an object that was not rebuilt."""


@pytest.mark.parametrize(
    "name", ["num_layers", "swiglu", "normalization", "rotary_base", "num_query_groups", "vocab_size"]
)
def test_an_object_where_a_value_is_needed_is_an_error(name: str) -> None:
    with pytest.raises(ExportError, match=rf"checkpoint args: {name} is .*\(Inert\), expected"):
        Checkpoint(LLAMA).args(**{name: Inert()}).resolve()


def test_objects_nobody_asks_for_are_ignored() -> None:
    assert Checkpoint(LLAMA).args(params_dtype=Inert(), exit_signal=Inert()).resolve().config == LLAMA_CONFIG


def test_an_override_stands_in_for_an_object() -> None:
    resolved = Checkpoint(LLAMA).args(layernorm_epsilon=Inert()).set("norm_epsilon=1e-5").resolve()
    assert resolved.config == LLAMA_CONFIG


def test_hostile_numbers_are_errors_not_memory() -> None:
    with pytest.raises(ExportError, match="num_layers"):
        Checkpoint(MIXTRAL).args(num_layers=10**15, moe_layer_freq=2).resolve()
    with pytest.raises(ExportError, match="rotary_base is"):
        Checkpoint(LLAMA).args(rotary_base=10**400).resolve()


# --- refusals ---------------------------------------------------------------------------------------------

REFUSED: dict[str, object] = {
    "apply_residual_connection_post_layernorm": True,
    "attention_output_gate": True,
    "softmax_type": "off-by-one",
    "softmax_scale": 0.125,
    "linear_attention_freq": 4,
    "experimental_attention_variant": "dsa",
    "no_rope_freq": [0, 0, 0, 1],
    "qk_l2_norm": True,
    "interleaved_attn_pattern": [5, 1],
    "sliding_window_rope_base": 10000.0,
    "position_embedding_type": "mrope",
    "rope_type": "yarn",
    "mrope_section": [16, 24, 24],
    "heterogeneous_layers_config_path": "a.json",
    "heterogeneous_block_specs": True,
    "hybrid_layer_pattern": "M-M*",
    "hybrid_override_pattern": "M-M*",
    "is_hybrid_model": True,
    "hybrid_attention_ratio": 0.1,
    "hybrid_mlp_ratio": 0.1,
    "retro_add_retriever": True,
    "moe_shared_expert_glu_interleave_size": 32,
    "moe_latent_size": 32,
    "moe_apply_probs_on_input": True,
    "moe_router_load_balancing_type": ["sinkhorn"],
    "moe_router_score_function": "sqrtsoftplus",
    "moe_router_topk_limited_devices": 2,
    "transformer_block_type": "post_ln",
    "headscale": True,
    "use_mup": True,
    "enable_mhc_connections": True,
}


def test_every_refusal_has_a_case() -> None:
    assert [refusal.argument for refusal in REFUSALS] == list(REFUSED)


@pytest.mark.parametrize(("argument", "value"), REFUSED.items())
def test_refusals_name_the_argument_and_the_reason(argument: str, value: object) -> None:
    (refusal,) = (refusal for refusal in REFUSALS if refusal.argument == argument)
    with pytest.raises(ExportError) as error:
        Checkpoint(MIXTRAL).args(**{argument: value}).resolve()
    assert f"{argument} = {value!r} cannot be exported: {refusal.reason}" in str(error.value)


# --- notes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "changes", "note"),
    [
        (LLAMA, {"rotary_seq_len_interpolation_factor": 4}, "the factor 4 of rotary_seq_len_interpolation_factor"),
        (LLAMA, {"use_rope_scaling": True, "rope_scaling_factor": 32.0}, "--set rope_scaling=llama3:8"),
        (GPT2, {"openai_gelu": True}, "--set activation=gelu_tanh"),
    ],
)
def test_arguments_that_training_ignored_are_noted(name: str, changes: dict[str, object], note: str) -> None:
    (found,) = Checkpoint(name).args(**changes).resolve().notes
    assert note in found


# --- checkpoints without arguments ------------------------------------------------------------------------

COMMON = ("norm_epsilon=1e-5", "zero_centered_norm=false", "max_position_embeddings=64")
ROPE = ("position_embedding=rope", "rotary_base=10000", "rotary_percent=1", "rope_scaling=none")
ROUTER = ("moe_top_k=2", "moe_router_pre_softmax=false", "moe_router_score_function=softmax")


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        (GPT2, "num_attention_heads, activation, zero_centered_norm, norm_epsilon"),
        (
            LLAMA,
            "num_attention_heads, activation, zero_centered_norm, norm_epsilon, position_embedding, rotary_base, "
            "rotary_percent, rope_scaling, max_position_embeddings",
        ),
        (
            MIXTRAL,
            "num_attention_heads, activation, zero_centered_norm, norm_epsilon, position_embedding, rotary_base, "
            "rotary_percent, rope_scaling, max_position_embeddings, moe_top_k, moe_router_pre_softmax, "
            "moe_router_score_function",
        ),
    ],
)
def test_without_arguments_one_error_lists_what_is_needed(name: str, missing: str) -> None:
    # The order is that of ModelConfig's fields.
    with pytest.raises(ExportError) as error:
        Checkpoint(name).without_arguments().resolve()
    assert str(error.value) == (
        "model configuration: the checkpoint holds no training arguments and the tensor shapes do not prove "
        f"{missing}: give each with --set field=value, or all in a YAML or JSON file with --config FILE"
    )


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        (GPT2, ("num_attention_heads=8", "activation=gelu", *COMMON[:2])),
        (LLAMA, ("num_attention_heads=8", "activation=silu", *COMMON, *ROPE)),
        (LLAMA, ("head_size=8", "activation=silu", *COMMON, *ROPE)),
        (
            MIXTRAL,
            ("num_attention_heads=8", "activation=silu", *COMMON, *ROPE, *ROUTER, "rotary_base=1e6"),
        ),
    ],
)
def test_without_arguments_shapes_and_settings_give_the_same_model(name: str, settings: tuple[str, ...]) -> None:
    expected = Checkpoint(name).resolve().config
    resolved = Checkpoint(name).without_arguments().set(*settings, "vocab_size=250").resolve()
    assert resolved.config == expected
    assert resolved.provenance["hidden_size"] == "tensor shape: embedding.word_embeddings.weight"
    assert resolved.provenance["num_query_groups"].startswith("tensor shape: ")
    assert "taken as Megatron's defaults: rotary_" in resolved.notes[-1]
    assert "attention_output_gate=false" in resolved.notes[-1]


def test_without_arguments_the_vocabulary_stays_padded() -> None:
    checkpoint = Checkpoint(GPT2).without_arguments()
    resolved = checkpoint.set("num_attention_heads=8", "activation=gelu", *COMMON[:2]).resolve()
    assert resolved.config.vocab_size == 256
    assert "no training arguments" in resolved.notes[0]


def test_resolving_imports_neither_torch_nor_yaml() -> None:
    code = "import sys, dist_export.models.resolve; print({'torch', 'numpy', 'yaml', 'megatron'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
