"""Plans of a tiny model against boxes written out by hand."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

import torch
from support.exports import tensors_of
from support.plans import plan_of
from support.quantizable import export_quantized, mixtral
from support.small_models import GPT, LLAMA, SmallModel, small_model

from dist_export.errors import ExportError
from dist_export.models.value_ops import ValueOp
from dist_export.plan.shard import PlannedTensor, place
from dist_export.targets.huggingface.target import HuggingFaceOptions
from dist_export.tensors.dtypes import BFLOAT16, FLOAT32
from dist_export.tensors.views import View

TINY: dict[str, Any] = {
    "hidden_size": 4, "ffn_hidden_size": 6, "num_attention_heads": 2, "num_query_groups": 1, "kv_channels": 2,
    "padded_vocab_size": 6,
}  # fmt: skip


def pieces(tensor: PlannedTensor) -> list[tuple[str, str, str]]:
    """(source, box in it, box here) of every piece."""
    return [
        (str(p.slab), str(p.source_box) if p.slab else "", str(p.box)) for p in tensor.view.pieces
    ]


def tiny_plan(style: dict[str, Any] = LLAMA, vocab_size: int = 5, **options: Any) -> list[dict[str, PlannedTensor]]:
    plan = plan_of(small_model(style, **TINY), vocab_size=vocab_size, **options)
    return [{tensor.name: tensor for tensor in shard.tensors} for shard in plan.shards().values()]


def test_llama_on_two_by_two() -> None:
    ranks = tiny_plan(tp_size=2, pp_size=2)
    first = {"transformer.vocab_embedding.weight"}
    last = {"transformer.ln_f.weight", "lm_head.weight"}
    layer = {
        "transformer.layers.0." + name + ".weight"
        for name in ("input_layernorm", "attention.qkv", "attention.dense", "post_layernorm", "mlp.fc", "mlp.gate",
                     "mlp.proj")
    }  # fmt: skip
    assert [set(rank) for rank in ranks] == [first | layer, first | layer, layer | last, layer | last]
    qkv = "decoder.layers.self_attention.linear_qkv.weight"
    assert pieces(ranks[1]["transformer.layers.0.attention.qkv.weight"]) == [
        # one group of 2 + 1 + 1 heads of 2 rows: rank 1 has query head 1, and the one key and value head again
        (qkv + "[0]", "[2:8, 0:4]", "[0:6, 0:4]"),
    ]
    assert pieces(ranks[0]["transformer.layers.0.attention.qkv.weight"]) == [
        (qkv + "[0]", "[0:2, 0:4]", "[0:2, 0:4]"),
        (qkv + "[0]", "[4:8, 0:4]", "[2:6, 0:4]"),
    ]
    fc1, fc2 = "decoder.layers.mlp.linear_fc1.weight[1]", "decoder.layers.mlp.linear_fc2.weight[1]"
    assert pieces(ranks[3]["transformer.layers.0.mlp.fc.weight"]) == [(fc1, "[3:6, 0:4]", "[0:3, 0:4]")]
    assert pieces(ranks[3]["transformer.layers.0.mlp.gate.weight"]) == [(fc1, "[9:12, 0:4]", "[0:3, 0:4]")]
    assert pieces(ranks[3]["transformer.layers.0.mlp.proj.weight"]) == [(fc2, "[0:4, 3:6]", "[0:4, 0:3]")]
    assert pieces(ranks[2]["lm_head.weight"]) == [("output_layer.weight", "[0:3, 0:4]", "[0:3, 0:4]")]
    assert pieces(ranks[3]["lm_head.weight"]) == [
        ("output_layer.weight", "[3:5, 0:4]", "[0:2, 0:4]"), ("None", "", "[2:3, 0:4]")
    ]  # fmt: skip
    assert pieces(ranks[2]["transformer.ln_f.weight"]) == [("decoder.final_layernorm.weight", "[0:4]", "[0:4]")]


@pytest.mark.parametrize(
    ("embedding", "boxes"),
    [
        ((True, 0), ["[0:3, 0:4]", "[3:5, 0:4]"]),
        ((True, 1), ["[0:5, 0:2]", "[0:5, 2:4]"]),
        ((False, 0), ["[0:5, 0:4]", "[0:5, 0:4]"]),
    ],
)
def test_embedding_sharding(embedding: tuple[bool, int], boxes: list[str]) -> None:
    from dist_export.targets.trtllm.tables import EmbeddingSharding

    ranks = tiny_plan(tp_size=2, embedding=EmbeddingSharding(*embedding))
    assert [pieces(rank["transformer.vocab_embedding.weight"])[0][1] for rank in ranks] == boxes
    assert [rank["lm_head.weight"].shape for rank in ranks] == [(3, 4), (3, 4)]  # not affected


def test_a_bias_the_source_lacks_is_zeros() -> None:
    model = small_model({**LLAMA, "add_qkv_bias": True}, **TINY)
    shard = plan_of(model, tp_size=2, family="llama").shards()[1]
    dense = next(t for t in shard.tensors if t.name == "transformer.layers.0.attention.dense.bias")
    assert pieces(dense) == [("None", "", "[0:4]")]
    qkv = next(t for t in shard.tensors if t.name == "transformer.layers.0.attention.qkv.bias")
    assert pieces(qkv) == [("decoder.layers.self_attention.linear_qkv.bias[0]", "[2:8]", "[0:6]")]
    assert not any("mlp" in t.name and "bias" in t.name for t in shard.tensors)


def test_steps_are_planned_per_tensor() -> None:
    model = small_model({**LLAMA, "layernorm_zero_centered_gamma": True}, **TINY)
    model.tensors["decoder.final_layernorm.weight"] = model.tensors["decoder.final_layernorm.weight"].float()
    tensors = {t.name: t for t in plan_of(model).shards()[0].tensors}
    assert tensors["transformer.ln_f.weight"].steps == ("add one", "cast float32 to bfloat16")
    assert tensors["transformer.layers.1.input_layernorm.weight"].steps == ("add one",)
    assert tensors["transformer.layers.1.mlp.fc.weight"].moves_only
    as_float = {t.name: t for t in plan_of(model, dtype="float32").shards()[0].tensors}
    assert as_float["transformer.ln_f.weight"].values == (ValueOp.ADD_ONE,)
    assert as_float["transformer.layers.1.mlp.fc.weight"].steps == ("cast bfloat16 to float32",)


def test_parts_of_one_tensor_must_have_one_element_type() -> None:
    model = small_model({**GPT, "swiglu": True}, **TINY)
    fc1 = model.tensors.pop("decoder.layers.mlp.linear_fc1.weight")
    gate, up = fc1.chunk(2, 1)
    model.tensors |= {"decoder.layers.mlp.linear_fc1.weight_w": gate, "decoder.layers.mlp.linear_fc1.weight_v": up}
    plan_of(model).shards()
    split = SmallModel(model.args, dict(model.tensors))
    split.tensors["decoder.layers.mlp.linear_fc1.weight_v"] = fc1.chunk(2, 1)[1].float()
    plan = plan_of(split)  # gate and up are tensors of their own there: each may have its own type
    assert {str(t.source_dtype) for t in plan.shards()[0].tensors if "mlp" in t.name} == {"bfloat16", "float32"}


def test_experts_that_lie_in_one_tensor_must_have_one_element_type(tmp_path: Path) -> None:
    model = mixtral()
    name = "decoder.layers.1.mlp.experts.experts.2.linear_fc2.weight"
    model.tensors[name] = model.tensors[name].float()
    checkpoint = model.write(tmp_path / "c")
    parts = r"layers.1.mlp.proj.weight: its parts differ in the checkpoint: element types \['bfloat16', 'float32'\]"
    with pytest.raises(ExportError, match=parts):
        export_quantized(checkpoint, tmp_path / "engine")
    hf = tensors_of(export_quantized(checkpoint, tmp_path / "hf", HuggingFaceOptions()) / "model.safetensors")
    assert torch.equal(
        hf["model.layers.1.block_sparse_moe.experts.2.w2.weight"].float(), model.tensors[name].bfloat16().float()
    )


def test_offsets_follow_without_gaps_and_large_tensors_start_on_pages() -> None:
    def planned(name: str, rows: int, width: int) -> PlannedTensor:
        return PlannedTensor(name, BFLOAT16, View.zeros((rows, width)), BFLOAT16, ())

    shard = place([planned("odd", 3, 5), planned("page", 2, 2048), planned("half", 1, 1024)], "f")
    assert [(t.name, t.offset) for t in shard.tensors] == [("page", 0), ("half", 8192), ("odd", 10240)]
    assert shard.num_data_bytes == 10270
    assert len(shard.header) % 4096 == 0
    assert struct.unpack("<Q", shard.header[:8])[0] + 8 == len(shard.header)


def test_the_digest_tells_plans_apart() -> None:
    model = small_model(LLAMA, **TINY)
    digests = {
        plan_of(model, **options).digest()
        for options in ({}, {"tp_size": 2}, {"pp_size": 2}, {"dtype": "float32"}, {"vocab_size": 5})
    }
    assert len(digests) == 5
    assert plan_of(model).digest() == plan_of(model).digest()


def test_missing_tensors_of_all_ranks_come_together() -> None:
    model = small_model(LLAMA, **TINY)
    del model.tensors["decoder.layers.mlp.linear_fc2.weight"]
    del model.tensors["decoder.final_layernorm.weight"]
    with pytest.raises(ExportError) as error:
        plan_of(model, tp_size=2).shards()
    assert "the export cannot be planned: 6 faults" in str(error.value)
    for rank in (0, 1):
        assert f"rank {rank}: transformer.layers.1.mlp.proj.weight: missing tensor of layer 1" in str(error.value)
        assert f"rank {rank}: transformer.ln_f.weight: missing tensor: the checkpoint has no" in str(error.value)


def test_float32_is_itself() -> None:
    tensors = plan_of(small_model(LLAMA, **TINY), dtype="float32").shards()[0].tensors
    assert {t.dtype for t in tensors} == {FLOAT32}
