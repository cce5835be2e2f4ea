"""What TensorRT-LLM would misread if it were written differently: each trap with its values.

The expected tensors are made here with torch from the model itself, on every rank of a 2 x 2 layout; nothing of the
code under test takes part. (Against TensorRT-LLM's own converter: `tests/conformance`.)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from support.exports import config_of, export, tensors_of  # noqa: E402
from support.small_models import GPT, LLAMA, NEMOTRON, SmallModel, small_model  # noqa: E402
from support.torch_dist import megatron_chunks, write_torch_dist  # noqa: E402

TP, PP = 2, 2


def expected_tensors(model: SmallModel, rank: int, *, vocab: int) -> dict[str, torch.Tensor]:
    """All tensors of one rank of the 2 x 2 layout, in float32."""
    a, tp, pp = model.args, rank % TP, rank // TP
    gated, zero_bias = a["swiglu"] or a.get("gated_linear_unit"), a["add_qkv_bias"] or a["add_bias_linear"]
    is_llama = a["normalization"] == "RMSNorm"
    per_stage = a["num_layers"] // PP
    out: dict[str, torch.Tensor] = {}

    def part(tensor: torch.Tensor, dim: int = 0) -> torch.Tensor:
        return tensor.chunk(TP, dim)[tp]

    def norm(target: str, name: str, layer: int | None) -> None:
        pick = (lambda n: model.tensors[n]) if layer is None else (lambda n: model.layer(layer, n))
        weight = pick(name + "weight")
        out[target + ".weight"] = weight + 1 if a["layernorm_zero_centered_gamma"] else weight
        if not is_llama:
            out[target + ".bias"] = pick(name + "bias")

    def heads(parts: list[torch.Tensor]) -> torch.Tensor:
        return torch.cat([part(each) for each in parts])

    for local in range(per_stage):
        layer, to = pp * per_stage + local, f"transformer.layers.{local}."
        norm(to + "input_layernorm", "self_attention.linear_qkv.layer_norm_", layer)
        norm(to + "post_layernorm", "mlp.linear_fc1.layer_norm_", layer)
        out[to + "attention.qkv.weight"] = heads(model.qkv(layer))
        out[to + "attention.dense.weight"] = part(model.layer(layer, "self_attention.linear_proj.weight"), 1)
        linears = {"mlp.fc": model.layer(layer, "mlp.linear_fc1.weight")}
        if gated:
            linears = dict(zip(("mlp.fc", "mlp.gate"), linears["mlp.fc"].chunk(2), strict=True))
        out |= {f"{to}{name}.weight": part(weight) for name, weight in linears.items()}
        out[to + "mlp.proj.weight"] = part(model.layer(layer, "mlp.linear_fc2.weight"), 1)
        if zero_bias:
            hidden, fc = a["hidden_size"], a["ffn_hidden_size"] // TP
            out[to + "attention.qkv.bias"] = heads(model.qkv(layer, "bias"))
            out[to + "attention.dense.bias"] = torch.zeros(hidden)
            if not is_llama:
                out |= {f"{to}{name}.bias": torch.zeros(fc) for name in linears}
                out[to + "mlp.proj.bias"] = torch.zeros(hidden)
        if a["add_bias_linear"]:
            out[to + "attention.dense.bias"] = model.layer(layer, "self_attention.linear_proj.bias")
            fc1 = model.layer(layer, "mlp.linear_fc1.bias").chunk(len(linears))
            out |= {f"{to}{name}.bias": part(bias) for name, bias in zip(linears, fc1, strict=True)}
            out[to + "mlp.proj.bias"] = model.layer(layer, "mlp.linear_fc2.bias")
    table = model.tensors["embedding.word_embeddings.weight"]
    head = model.tensors.get("output_layer.weight", table)
    if pp == 0:
        out["transformer.vocab_embedding.weight"] = part(padded(table[:vocab]))
        if not is_llama and a["position_embedding_type"] == "learned_absolute":
            out["transformer.position_embedding.weight"] = part(
                model.tensors["embedding.position_embeddings.weight"]
            )
    if pp == PP - 1:
        norm("transformer.ln_f", "decoder.final_layernorm.", None)
        out["lm_head.weight"] = part(padded(head[:vocab]))
    return out


def padded(table: torch.Tensor) -> torch.Tensor:
    missing = -len(table) % TP
    return torch.cat([table, torch.zeros(missing, table.shape[1], dtype=table.dtype)])


def exported(model: SmallModel, folder: Path, *options: object) -> Path:
    chunks = megatron_chunks(tp=2)
    checkpoint = write_torch_dist(folder / "checkpoint", model.tensors, args=model.args, chunks=chunks)
    return export(checkpoint, folder / "out", "--tp", TP, "--pp", PP, *options)


VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # Megatron's arguments -> fields of config.json
    "llama": (LLAMA, {"hidden_act": "silu", "mlp_bias": False, "attn_bias": False}),
    "llama, qkv bias only": (
        {**LLAMA, "add_qkv_bias": True}, {"hidden_act": "silu", "mlp_bias": False, "attn_bias": True}
    ),
    "llama, all biases": (
        {**LLAMA, "add_bias_linear": True}, {"hidden_act": "silu", "mlp_bias": True, "attn_bias": True}
    ),
    "llama, tied": ({**LLAMA, "untie_embeddings_and_output_weights": False}, {"share_embedding_table": False}),
    "llama, zero-centred": ({**LLAMA, "layernorm_zero_centered_gamma": True}, {"hidden_act": "silu"}),
    "llama 3.1": (
        {**LLAMA, "use_rope_scaling": True, "rope_scaling_factor": 8.0, "rotary_base": 500000},
        {
            "rotary_base": 500000.0,
            "rotary_scaling": {
                "type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        },
    ),
    "llama, linear scaling": (
        {**LLAMA, "rotary_seq_len_interpolation_factor": 4},
        {"rotary_scaling": {"type": "linear", "factor": 4.0}},
    ),
    "gpt": (
        GPT,
        {"hidden_act": "gelu", "bias": True, "position_embedding_type": "learned_absolute", "rotary_scaling": None},
    ),
    "gpt, tied": ({**GPT, "untie_embeddings_and_output_weights": False}, {"share_embedding_table": False}),
    "gpt, swiglu": ({**GPT, "swiglu": True}, {"hidden_act": "swiglu"}),
    "gpt, geglu": ({**GPT, "gated_linear_unit": True, "bias_gelu_fusion": True}, {"hidden_act": "geglu"}),
    "gpt, qkv bias only": ({**GPT, "add_bias_linear": False, "add_qkv_bias": True}, {"bias": True}),
    "gpt, no bias": ({**GPT, "add_bias_linear": False}, {"bias": False, "hidden_act": "gelu"}),
    "gpt, rope": (
        {**GPT, "position_embedding_type": "rope", "rotary_interleaved": True},
        {"position_embedding_type": "rope_gptj", "rotary_pct": 1.0},
    ),
    "nemotron": (
        NEMOTRON,
        {"hidden_act": "squared-relu", "rotary_pct": 0.5, "position_embedding_type": "rope_gpt_neox", "bias": False},
    ),
}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_rank_holds_exactly_what_the_class_expects(variant: str, tmp_path: Path) -> None:
    style, fields = VARIANTS[variant]
    model = small_model(style)
    output = exported(model, tmp_path, "--vocab-size", 61, "--family", variant.replace(",", " ").split()[0])
    for rank in range(TP * PP):
        written = tensors_of(output / f"rank{rank}.safetensors")
        wanted = expected_tensors(model, rank, vocab=61)
        assert written.keys() == wanted.keys()
        for name, tensor in wanted.items():
            torch.testing.assert_close(written[name].float(), tensor.bfloat16().float(), rtol=0, atol=0, msg=name)
    config = config_of(output)
    assert {name: config.get(name) for name in fields} == fields
    assert config["vocab_size"] == 61
    assert config["position_embedding_type"] in ("rope_gpt_neox", "rope_gptj", "learned_absolute")
    if "llama" in variant and "scaling" not in variant and "3.1" not in variant:
        assert (config["position_embedding_type"], config["rotary_scaling"]) == ("rope_gpt_neox", None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_norms_gain_one_before_the_cast_and_in_their_own_type(dtype: torch.dtype, tmp_path: Path) -> None:
    """A weight of 0.0039 is 1.0039 in float32 and 1 in bfloat16: where the one is added shows."""
    model = small_model(NEMOTRON)
    name = "decoder.final_layernorm.weight"
    model.tensors[name] = torch.linspace(-0.01, 0.01, 32).to(dtype)
    output = exported(model, tmp_path, "--dtype", "float32")
    written = tensors_of(output / "rank3.safetensors")["transformer.ln_f.weight"]
    assert torch.equal(written, (model.tensors[name] + 1).float())


def test_an_exact_gelu_is_exported_with_a_note(tmp_path: Path) -> None:
    import json

    output = exported(small_model(GPT), tmp_path)
    notes = json.loads((output / "export_manifest.json").read_text())["notes"]
    assert any("exact gelu; TensorRT-LLM computes every gelu as its tanh form" in note for note in notes)
    assert any("the padded size 64 is kept" in note for note in notes)


def test_few_key_value_heads_are_repeated(tmp_path: Path) -> None:
    model = small_model({**LLAMA, "num_query_groups": 1})
    checkpoint = write_torch_dist(tmp_path / "c", model.tensors, args=model.args)
    output = export(checkpoint, tmp_path / "out", "--tp", 4)
    query, key, value = model.qkv(1)
    for rank in range(4):
        written = tensors_of(output / f"rank{rank}.safetensors")["transformer.layers.1.attention.qkv.weight"]
        assert torch.equal(written, torch.cat([query.chunk(4)[rank], key, value]))
    assert config_of(output)["num_key_value_heads"] == 1


@pytest.mark.parametrize(
    ("options", "shapes"),
    [
        ((), [(16, 32), (16, 32), (16, 32), (13, 32)]),
        (("--no-parallel-embedding",), [(61, 32)] * 4),
        (("--embedding-sharding-dim", 1), [(61, 8)] * 4),
    ],
    ids=str,
)
def test_embedding_tables(options: tuple[object, ...], shapes: list[tuple[int, int]], tmp_path: Path) -> None:
    model = small_model(LLAMA)
    checkpoint = write_torch_dist(tmp_path / "c", model.tensors, args=model.args)
    output = export(checkpoint, tmp_path / "out", "--tp", 4, "--vocab-size", 61, *options)
    table = model.tensors["embedding.word_embeddings.weight"][:61]
    for rank, shape in enumerate(shapes):
        written = tensors_of(output / f"rank{rank}.safetensors")
        held = written["transformer.vocab_embedding.weight"]
        if not options:
            assert held.shape == (16, 32)
            assert torch.equal(held[: shape[0]], table.split(16)[rank])
            assert not held[shape[0] :].any()
        else:
            assert torch.equal(held, table if shape[1] == 32 else table.chunk(4, 1)[rank])
        assert written["lm_head.weight"].shape == (16, 32)
    config = config_of(output)
    assert config["use_parallel_embedding"] is ("--no-parallel-embedding" not in options)
    assert config["embedding_sharding_dim"] == (1 if "--embedding-sharding-dim" in options else 0)


def test_gate_and_up_under_two_keys_and_keys_per_layer_give_the_same_export(tmp_path: Path) -> None:
    model = small_model(LLAMA)
    stacked = exported(model, tmp_path / "stacked")
    tensors = model.per_layer()
    for layer in range(2):
        gate, up = tensors.pop(f"decoder.layers.{layer}.mlp.linear_fc1.weight").chunk(2)
        tensors |= {f"decoder.layers.{layer}.mlp.linear_fc1.weight_w": gate.clone()}
        tensors |= {f"decoder.layers.{layer}.mlp.linear_fc1.weight_v": up.clone()}
    fused, local = "self_attention.linear_qkv.layer_norm_", "input_layernorm."
    renamed = {name.replace(fused, local): tensor for name, tensor in tensors.items()}
    checkpoint = write_torch_dist(
        tmp_path / "apart", renamed, args=model.args, common="record", prefix="model.module.",
        extra_objects={"decoder.layers.0.mlp.linear_fc1._extra_state/shard_0_1": torch.zeros(3)},
    )  # fmt: skip
    apart = export(checkpoint, tmp_path / "out", "--tp", TP, "--pp", PP)
    for rank in range(TP * PP):
        name = f"rank{rank}.safetensors"
        assert (stacked / name).read_bytes() == (apart / name).read_bytes()
