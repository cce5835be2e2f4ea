"""The parts of live export, in one process: memory, tables, exchange, and the migration surface with plain tensors."""

from __future__ import annotations

import io
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.small_models import LLAMA, small_model

from dist_export.errors import ExportError
from dist_export.live.exchange import Parcel, disjoint, pack
from dist_export.live.memory import RankMemory
from dist_export.live.sharded_state import collect
from dist_export.live.sources import Part
from dist_export.live.table import Holdings, ShardEntry, make_table
from dist_export.megatron_export import ExportConfig, TRTLLMHelper
from dist_export.megatron_export.names import renamed
from dist_export.tensors.views import Slab


@dataclass
class Configuration:
    """The fields of a TransformerConfig that the model of these tests needs."""

    num_layers: int = 2
    hidden_size: int = 32
    ffn_hidden_size: int = 48
    num_attention_heads: int = 4
    num_query_groups: int | None = 2
    kv_channels: int | None = 8
    normalization: str = "RMSNorm"
    layernorm_epsilon: float = 1e-5
    layernorm_zero_centered_gamma: bool = False
    gated_linear_unit: bool = True
    activation_func: Any = torch.nn.functional.silu
    add_bias_linear: bool = False
    add_qkv_bias: bool = False
    num_moe_experts: int | None = None
    params_dtype: Any = torch.bfloat16


def helper(**changes: Any) -> TRTLLMHelper:
    arguments = {
        "transformer_config": Configuration(),
        "model_type": SimpleNamespace(name="llama"),
        "position_embedding_type": "rope",
        "max_position_embeddings": 64,
    }
    return TRTLLMHelper(**{**arguments, **changes})


def convert(state: dict[str, Any], tp: int = 2, pp: int = 1, *, by: TRTLLMHelper | None = None, **more: Any) -> Any:
    return (by or helper()).get_trtllm_pretrained_config_and_model_weights(
        state, torch.bfloat16, ExportConfig(tp, pp), **more
    )


def test_addresses_are_those_of_tensors_also_where_they_begin_within_a_storage() -> None:
    whole = torch.arange(24, dtype=torch.int16).reshape(6, 4)
    memory = RankMemory()
    first, half = memory.add(whole[:1]), memory.add(whole[3:])
    buffer = bytearray(8)
    memory.read_into(half + 8, memoryview(buffer))
    assert torch.frombuffer(buffer, dtype=torch.int16).tolist() == [16, 17, 18, 19]
    assert memory.elements(half + 2, 2, (2, 2), (8, 2)).tolist() == [[13, 14], [17, 18]]
    assert memory.elements(first, 2, (1, 4), (8, 2)).tolist() == [[0, 1, 2, 3]]


def test_the_device_is_that_of_the_weights() -> None:
    """States of layers are bytes on the CPU, and may come first. The meta device stands for a GPU."""
    memory = RankMemory()
    assert memory.device == torch.device("cpu")
    memory.add(torch.zeros(8, dtype=torch.uint8))
    assert memory.device == torch.device("cpu")
    memory.add(torch.zeros(2, 2, device="meta"))
    assert memory.device == torch.device("meta")
    memory.settle()


def test_a_parcel_is_packed_row_by_row() -> None:
    memory = RankMemory()
    address = memory.add(torch.arange(12, dtype=torch.int32).reshape(3, 4))
    part = Part(Slab("w"), 0, 0, (1, 3, 1, 3))
    packed = pack([Parcel(0, part, address + 20, (16, 4), 4)], memory)
    assert packed.view(torch.int32).tolist() == [5, 6, 9, 10]


def test_rectangles_that_overlap_are_sent_once() -> None:
    assert disjoint([(0, 2, 0, 4), (4, 6, 0, 4), (0, 2, 0, 4)]) == [(0, 2, 0, 4), (4, 6, 0, 4)]
    assert disjoint([(0, 3, 0, 4), (2, 5, 2, 6), (4, 8, 0, 1)]) == [(0, 8, 0, 6)]


def entry(start: int, *, dtype: str = "float32", size: int = 2) -> ShardEntry:
    return ShardEntry("decoder.final_layernorm.weight", (4,), dtype, (start,), (size,), 0, size * 4)


def test_replicas_are_told_and_everybody_takes_its_own() -> None:
    table = make_table([Holdings((entry(0),)), Holdings((entry(2),)), Holdings((entry(0),))])
    first = table.index.chunks("decoder.final_layernorm.weight")[0]
    assert table.places(first) == ((0, 0), (2, 0))
    assert [table.place_for(first, receiver)[0] for receiver in range(3)] == [0, 2, 2]


def test_ranks_that_do_not_fit_together_are_refused() -> None:
    with pytest.raises(ExportError, match=r"rank 1 says float16 \[4\], rank 0 float32"):
        make_table([Holdings((entry(0),)), Holdings((entry(2, dtype="float16"),))])
    with pytest.raises(ExportError, match="chunks do not make whole tensors"):
        make_table([Holdings((entry(0),))])
    with pytest.raises(ExportError, match=r"give what model\.sharded_state_dict"):
        collect({"weight": torch.zeros(2)})


@pytest.mark.parametrize("stacked", [True, False])
def test_stacked_layers_and_single_ones_give_the_same(stacked: bool) -> None:
    model = small_model(LLAMA)
    weights, configs = convert(model.tensors if stacked else model.per_layer())
    assert [config.rank for config in configs] == [0, 1]
    assert configs[0].values["mapping"]["tp_size"] == 2
    assert configs[0].values["mapping"]["gpus_per_node"] == 2
    query, key, value = model.qkv(1)
    expected = torch.cat([query[16:], key[8:], value[8:]])
    assert torch.equal(weights[1]["transformer.layers.1.attention.qkv.weight"], expected)


def test_own_names_are_led_to_those_of_megatron() -> None:
    model = small_model(LLAMA)
    names = {"decoder.layers.attn.out.weight": SimpleNamespace(value="transformer.layers.attention.dense.weight")}
    own = {n.replace("self_attention.linear_proj", "attn.out"): t for n, t in model.per_layer().items()}
    weights, _ = convert(own, by=helper(trtllm_conversion_dict=names))
    expected, _ = convert(model.per_layer())
    assert all(torch.equal(weights[0][name], tensor) for name, tensor in expected[0].items())
    with pytest.raises(ExportError, match="no layer that can be converted to"):
        renamed({}, {"a": "transformer.unknown"})


def te_state(scale: float) -> io.BytesIO:
    """As TransformerEngine 1 saves a layer's state: scales of the input, the weight and the output."""
    scales = torch.tensor([scale, 1.0, 1.0])
    history = torch.full((4, 3), 2.0)
    state = {"scale_fwd": scales, "scale_inv_fwd": 1 / scales, "amax_history_fwd": history}
    buffer = io.BytesIO()
    torch.save({**state, "extra_fp8_variables": {"num_gemms": 1}}, buffer)
    return buffer


def test_fp8_takes_scales_of_activations_and_measures_weights() -> None:
    model = small_model(LLAMA)
    state: dict[str, Any] = model.per_layer()
    linears = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")
    for layer in range(2):
        for linear in linears:
            state[f"decoder.layers.{layer}.{linear}._extra_state"] = te_state(4.0)
    weights, configs = convert(state, fp8_quantized=True, fp8_kvcache=True, kv_cache_scale=2.0)
    assert configs[0].values["quantization"]["quant_algo"] == "FP8"
    proj = "transformer.layers.0.mlp.proj."
    whole = model.layer(0, "mlp.linear_fc2.weight").float()
    scale = whole.abs().max() / 448
    for rank, tensors in enumerate(weights):
        assert tensors[proj + "activation_scaling_factor"].item() == 0.25
        assert tensors[proj + "weights_scaling_factor"].item() == scale.item()  # of all ranks together
        expected = (whole[:, 24 * rank : 24 * rank + 24] / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
        assert torch.equal(tensors[proj + "weight"].view(torch.uint8), expected.view(torch.uint8))
        assert tensors["transformer.layers.0.attention.kv_cache_scaling_factor"].item() == 2.0


@pytest.mark.parametrize(
    ("changes", "more", "message"),
    [
        ({"model_type": "falcon"}, {}, "model_type is falcon, but the model's .* are those of llama"),
        ({"model_type": "bert"}, {}, "model_type bert: expected one of gpt, gptnext, llama"),
        ({"activation": "squared-relu"}, {}, "activation is squared-relu, but transformer_config computes silu"),
        ({"position_embedding_type": "alibi"}, {}, "position_embedding_type alibi"),
        ({"moe_renorm_mode": 1}, {}, "leave it out"),
        ({}, {"fp8_kvcache": True}, "KV cache"),
        ({}, {"fp8_quantized": True}, "(?s)scale"),
        ({}, {"on_device_distributed_conversion": True}, "vocab_size, the tokenizer's, is needed"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], more: dict[str, Any], message: str) -> None:
    with pytest.raises(ExportError, match=message):
        convert(small_model(LLAMA).per_layer(), by=helper(**changes), **more)


def test_tensors_without_memory_are_named() -> None:
    state = small_model(LLAMA).per_layer()
    state["output_layer.weight"] = state["output_layer.weight"].to("meta")
    with pytest.raises(ExportError, match=r"output_layer\.weight has no memory .*: load the model first"):
        convert(state)
