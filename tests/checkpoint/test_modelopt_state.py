"""ModelOpt's states: four that its release 0.47 wrote, the forms of the releases before, and what is refused."""

from __future__ import annotations

import argparse
import io
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support.other_formats import pack
from support.quantizer_states import modelopt_state, properties, te_state
from support.torch_dist import write_torch_dist

from dist_export.checkpoint.extra_state import decode_extra_state
from dist_export.checkpoint.modelopt_rules import apply_rules, config_rules
from dist_export.checkpoint.modelopt_state import ModeloptScheme, read_modelopt_scheme
from dist_export.checkpoint.open import open_checkpoint
from dist_export.checkpoint.quantizer_names import ModuleName, Quantity, Quantizer, module_name, quantizer_tensor
from dist_export.checkpoint.quantizer_scheme import KvScheme, Scheme, kv_scheme, linear_scheme, properties_of
from dist_export.errors import ExportError

DATA = Path(__file__).parent / "data" / "modelopt"
"""``modelopt_state/common.pt`` and the record of a layer's state (linear_proj of layer 0) of real checkpoints: a small
Llama that ModelOpt 0.47 quantised in Megatron-Core 0.16.1."""
LAYER = "decoder.layers.0."
LINEARS = [
    module_name(LAYER + name)
    for name in ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")
]
PROJ = LINEARS[1]
REAL = {
    "fp8": (Scheme.FP8, "max", None, False, ("_amax",), ("_amax",)),
    "int8_sq": (Scheme.INT8_SQ, "smoothquant", None, True, ("_amax",), ("_amax", "_pre_quant_scale")),
    "int4_awq": (Scheme.INT4_AWQ, "awq_lite", 128, True, ("_amax",), ("_pre_quant_scale",)),
    "nvfp4": (Scheme.NVFP4, "max", 16, False, ("_amax",), ("_amax",)),
}


def scheme_in(folder: Path) -> ModeloptScheme:
    found = read_modelopt_scheme(open_checkpoint(folder).index)
    assert found is not None
    return found


def checkpoint(path: Path, objects: dict[str, Any] | None = None, common: Any = None, *, raw: bytes = b"") -> Path:
    """A torch_dist checkpoint of one weight, these objects and this common state of ModelOpt."""
    states = {name: [state] for name, state in (objects or {}).items()}
    folder = write_torch_dist(path, {"decoder.final_layernorm.weight": torch.ones(4)}, args={}, extra_objects=states)
    if common is not None or raw:
        (folder / "modelopt_state").mkdir()
        (folder / "modelopt_state" / "common.pt").write_bytes(raw or saved(common))
    return folder


def saved(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def common_state(quant_cfg: Any, *, algorithm: Any = "max", version: str = "0.39.0", metadata: Any = None) -> Any:
    config = {"quant_cfg": quant_cfg, "algorithm": algorithm}
    modes = [("quantize", {"config": config, "metadata": metadata or {}})]
    return {"modelopt_version": version, "modelopt_state_dict": modes}


@pytest.mark.parametrize("name", REAL)
def test_real_states(tmp_path: Path, name: str) -> None:
    scheme, algorithm, group_size, pre_quant_scale, weight_buffers, input_buffers = REAL[name]
    data = DATA / name
    (state,) = torch.load(data / "linear_proj_extra_state.pt", weights_only=True)
    folder = checkpoint(
        tmp_path / "c",
        {f"{LAYER}self_attention.linear_proj._extra_state/shard_0_1": state},
        raw=(data / "common.pt").read_bytes(),
    )
    found = scheme_in(folder)
    assert (found.version, found.algorithm, found.is_compressed) == ("0.47.0", algorithm, False)
    own = found.linear(PROJ)
    assert (own.scheme, own.group_size, own.pre_quant_scale) == (scheme, group_size, pre_quant_scale)
    assert own.weight[0].buffers == weight_buffers and own.input is not None and own.input.buffers == input_buffers
    assert own.static_activation == (name != "int4_awq")
    assert found.overall(LINEARS) is scheme  # the others by the configuration alone
    assert found.linear(LINEARS[0]).pre_quant_scale is None
    for plain in ("output_layer", "embedding.word_embeddings", f"{LAYER}mlp.router"):
        assert found.linear(module_name(plain)).scheme is Scheme.NONE
    attention = module_name(f"{LAYER}self_attention.core_attention")
    assert found.kv_cache(attention, LINEARS[0]) is KvScheme.NONE


@pytest.mark.parametrize("name", REAL)
def test_the_configuration_says_what_the_layers_own_state_says(name: str) -> None:
    common = torch.load(DATA / name / "common.pt", weights_only=False)
    (_, first), *_ = common["modelopt_state_dict"]
    rules = config_rules(first["config"]["quant_cfg"], origin="common.pt")
    record = (DATA / name / "linear_proj_extra_state.pt").read_bytes()
    own = decode_extra_state(record, origin="r").modelopt
    assert own is not None
    for quantizer in ("weight_quantizer", "input_quantizer"):
        (told,), is_ = apply_rules(rules, PROJ, quantizer), properties_of(own["modelopt_quantizer_state"][quantizer])
        for field in ("num_bits", "block_sizes", "block_type", "scale_bits", "enabled", "dynamic", "fake"):
            assert getattr(told, field) == getattr(is_, field), field


def test_no_modelopt(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "c", {f"{LAYER}mlp.linear_fc1._extra_state/shard_0_1": te_state("2.3", None)})
    assert read_modelopt_scheme(open_checkpoint(folder).index) is None


FP8, INT4 = {"num_bits": (4, 3), "axis": None}, {"num_bits": 4, "block_sizes": {-1: 128, "type": "static"}}
OFF = {"enable": False}


def test_configuration_of_older_releases(tmp_path: Path) -> None:
    """A dict of patterns: ``default`` is for all, the last match wins, a list is one quantiser after the other."""
    quant_cfg = {
        "*weight_quantizer": [INT4, {"num_bits": (4, 3)}],
        "*input_quantizer": FP8,
        "nn.BatchNorm1d": {"*": OFF},
        "*layers.0.mlp*": OFF,
        "*linear_proj.input_quantizer": OFF,
        "default": OFF,
    }
    found = scheme_in(checkpoint(tmp_path / "c", common=common_state(quant_cfg, algorithm={"method": "awq_full"})))
    assert (found.version, found.algorithm) == ("0.39.0", "awq_full")
    schemes = [each.scheme for each in found.linears(LINEARS).values()]
    assert schemes == [Scheme.W4A8_AWQ, Scheme.W4A8_AWQ, Scheme.NONE, Scheme.NONE]
    assert [found.linear(name).static_activation for name in LINEARS[:2]] == [True, False]
    assert found.overall(LINEARS[2:]) is Scheme.NONE and found.overall(LINEARS[:1]) is Scheme.W4A8_AWQ
    expert = module_name("decoder.layers.1.mlp.experts.experts.7.linear_fc1")
    assert found.linear(expert).group_size == 128


def test_mixed_schemes(tmp_path: Path) -> None:
    quant_cfg = [
        {"quantizer_name": "*", "cfg": None, "enable": False, "parent_class": None},
        {"quantizer_name": "*weight_quantizer", "cfg": INT4},
        {"quantizer_name": "*linear_proj.weight_quantizer", "cfg": {"num_bits": 8, "axis": 0}, "enable": True},
        {"quantizer_name": "*linear_qkv.weight_quantizer", "cfg": [INT4, FP8], "enable": True},
        {"quantizer_name": "*linear_fc1*", "cfg": None, "enable": False},
        {"quantizer_name": "*", "parent_class": "nn.Embedding", "cfg": None, "enable": True},
    ]
    found = scheme_in(checkpoint(tmp_path / "c", common=common_state(quant_cfg)))
    schemes = [each.scheme for each in found.linears(LINEARS).values()]
    assert schemes == [Scheme.W4A8_AWQ, Scheme.INT8_WO, Scheme.NONE, Scheme.INT4_AWQ]
    assert found.overall(LINEARS) is Scheme.MIXED
    assert found.linear(LINEARS[2]).weight[0].num_bits == 4  # switched off, and what it was


def test_patterns_of_experts() -> None:
    rules = config_rules({"*mlp.experts.local_experts.3.*": FP8, "*.experts.linear_fc2.*": INT4}, origin="c")
    fc1, fc2 = (module_name(f"decoder.layers.0.mlp.experts.experts.3.linear_fc{i}") for i in (1, 2))
    assert apply_rules(rules, fc1, "weight_quantizer")[0].num_bits == (4, 3)
    assert apply_rules(rules, fc2, "weight_quantizer")[0].num_bits == 4


def test_one_setting_for_several_quantisers() -> None:
    """In a dict it is for each of them, as `set_quantizer_attribute` does it; in a list it replaces all."""
    eight = {"num_bits": 8, "axis": 0}
    rules = config_rules({"*weight_quantizer": [INT4, FP8], "*linear_proj.weight_quantizer": eight}, origin="c")
    assert [each.num_bits for each in apply_rules(rules, LINEARS[0], "weight_quantizer")] == [4, (4, 3)]
    assert [each.num_bits for each in apply_rules(rules, PROJ, "weight_quantizer")] == [8, 8]
    entries = [{"quantizer_name": "*weight_quantizer", "cfg": cfg, "enable": True} for cfg in ([INT4, FP8], eight)]
    assert [each.num_bits for each in apply_rules(config_rules(entries, origin="c"), PROJ, "weight_quantizer")] == [8]


@pytest.mark.parametrize("inputs", [FP8, {**FP8, "axis": 0}])
def test_fp8_rows_with_a_fixed_scale_of_inputs_have_no_name(inputs: dict[str, Any]) -> None:
    found = {
        "weight_quantizer": (properties_of({"num_bits": (4, 3), "axis": 0}),),
        "input_quantizer": (properties_of(inputs),),
    }
    with pytest.raises(ValueError, match="FP8 with an amax per \\[0\\] and an input that has a fixed amax"):
        linear_scheme(found)


def test_a_layers_own_state_beats_the_configuration(tmp_path: Path) -> None:
    states = {
        f"{LAYER}mlp.linear_fc1._extra_state/shard_0_1": modelopt_state(
            {"weight_quantizer": properties((4, 3), disabled=True)}
        ),
        f"{LAYER}mlp.linear_fc2._extra_state/shard_0_1": modelopt_state(
            {"weight_quantizer.0": properties(4, block_sizes={-1: 128}), "weight_quantizer.1": properties((4, 3))},
            zipped=False,
        ),
        f"{LAYER}self_attention.linear_proj._extra_state/shard_0_1": None,  # disabled, through ModelOpt 0.40
    }
    found = scheme_in(checkpoint(tmp_path / "c", states, common_state({"*weight_quantizer": FP8})))
    schemes = [each.scheme for each in found.linears(LINEARS).values()]
    assert schemes == [Scheme.FP8, Scheme.NONE, Scheme.NONE, Scheme.W4A8_AWQ]


def test_compressed_weights(tmp_path: Path) -> None:
    kind = {"weight_quantizer": properties((4, 3), fake_quant=False)}
    packed = {"modelopt_real_quantizer_state": kind["weight_quantizer"], "modelopt_q_tensor_state": {"metadata": {}}}
    plain = {"modelopt_real_quantizer_state": kind["weight_quantizer"], "modelopt_q_tensor_state": {}}
    states = {
        f"{LAYER}mlp.linear_fc1._extra_state/shard_0_1": modelopt_state(kind, **packed),
        f"{LAYER}mlp.linear_fc2._extra_state/shard_0_1": modelopt_state(kind, **plain),
    }
    found = scheme_in(checkpoint(tmp_path / "c", states, common_state({})))
    assert [found.linear(name).compressed for name in LINEARS[2:]] == [True, False]
    assert found.is_compressed


def test_kv_cache(tmp_path: Path) -> None:
    attention = module_name(f"{LAYER}self_attention.core_attention")
    states = {
        f"{attention}._extra_state/shard_0_1": modelopt_state(
            {"k_bmm_quantizer": properties((4, 3)), "v_bmm_quantizer": properties((4, 3))}
        )
    }
    found = scheme_in(checkpoint(tmp_path / "a", states, common_state({})))
    assert found.kv_cache(attention, LINEARS[0]) is KvScheme.FP8
    old = common_state({"*linear_qkv.output_quantizer": {"num_bits": 8}})
    assert scheme_in(checkpoint(tmp_path / "b", common=old)).kv_cache(attention, LINEARS[0]) is KvScheme.INT8
    new = common_state({"*[kv]_bmm_quantizer": {"num_bits": (2, 1), "block_sizes": {-1: 16, "scale_bits": (4, 3)}}})
    assert scheme_in(checkpoint(tmp_path / "c", common=new)).kv_cache(attention, LINEARS[0]) is KvScheme.NVFP4
    with pytest.raises(ValueError, match="keys and values are quantised to"):
        kv_scheme([properties_of({"num_bits": 8}), properties_of({"num_bits": (4, 3)})])


NVFP4 = {"num_bits": (2, 1), "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": (4, 3)}}
MX = {"block_sizes": {-1: 32, "type": "dynamic", "scale_bits": (8, 0)}}
TOKEN = {"num_bits": (4, 3), "type": "dynamic", "block_sizes": {-1: None}}
SCHEMES = [
    (FP8, FP8, Scheme.FP8),
    ({"num_bits": (4, 3), "axis": 0}, TOKEN, Scheme.FP8_PER_CHANNEL_PER_TOKEN),
    ({"num_bits": (4, 3), "block_sizes": {-1: 128, -2: 128}}, OFF, Scheme.FP8_BLOCK),
    ({"num_bits": 8, "axis": 0}, {"num_bits": 8}, Scheme.INT8_SQ),
    ({"num_bits": 8, "axis": 0}, OFF, Scheme.INT8_WO),
    (INT4, OFF, Scheme.INT4_AWQ),
    (NVFP4, NVFP4, Scheme.NVFP4),
    (NVFP4, OFF, Scheme.W4A16_NVFP4),
    (NVFP4, FP8, Scheme.W4A8_NVFP4_FP8),
    ({"num_bits": (2, 1), **MX}, {"num_bits": (2, 1), **MX}, Scheme.MXFP4),
    ({"num_bits": (2, 1), **MX}, FP8, Scheme.W4A8_MXFP4_FP8),
    ({"num_bits": (4, 3), **MX}, {"num_bits": (4, 3), **MX}, Scheme.MXFP8),
    (OFF, FP8, Scheme.NONE),
]


@pytest.mark.parametrize(("weight", "entry", "scheme"), SCHEMES)
def test_schemes(weight: Any, entry: Any, scheme: Scheme) -> None:
    rules = config_rules({"*weight_quantizer": weight, "*input_quantizer": entry}, origin="c")
    found = {name: apply_rules(rules, PROJ, name) for name in ("weight_quantizer", "input_quantizer")}
    linear = linear_scheme(found)
    assert linear.scheme is scheme
    assert linear.static_activation == (entry is not OFF and entry is not TOKEN and "block_sizes" not in entry) or (
        entry is NVFP4 or entry.get("block_sizes") == MX["block_sizes"]
    )


def test_nvfp4_with_a_factor_per_channel() -> None:
    state = {"_num_bits": (2, 1), "_block_sizes": NVFP4["block_sizes"]}
    with_factor = {**state, "_pytorch_state_metadata": {"buffers": {"_amax": {}, "_pre_quant_scale": {}}}}
    found = {"weight_quantizer": (properties_of(state),), "input_quantizer": (properties_of(with_factor),)}
    assert linear_scheme(found).scheme is Scheme.NVFP4_AWQ


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        ({"num_bits": 3}, "quantised to 3 bits"),
        ({"num_bits": 4}, "quantised to 4 bits"),
        ([FP8, INT4], r"quantised 2 times, to \[\(4, 3\), 4\]"),
        ({"num_bits": (4, 3), "axis": 1}, r"an amax per \[1\]"),
        ({"num_bits": (2, 1), "block_sizes": {-1: 16, "scale_bits": (5, 2)}}, r"scales of \(5, 2\) bits"),
        ({"num_bits": "fp3"}, "number of bits is 'fp3'"),
        ({"num_bits": 4, "block_sizes": {-1: 0}}, "a block of 0 elements"),
        ({"num_bits": 4, "block_sizes": [128]}, "block sizes are"),
        ({"num_bits": 8, "axis": "all"}, "axis is 'all'"),
    ],
)
def test_what_has_no_name(tmp_path: Path, weight: Any, message: str) -> None:
    found = scheme_in(checkpoint(tmp_path / "c", common=common_state({"*weight_quantizer": weight})))
    with pytest.raises(ExportError, match=message) as caught:
        found.linears(LINEARS)
    assert "linear_qkv" in str(caught.value) and "linear_fc2" in str(caught.value)  # all of them


def test_records_of_releases_before_029(tmp_path: Path) -> None:
    """The folder was a sharded checkpoint: an object per module (0.25 on), or per layer before."""
    folder = checkpoint(tmp_path / "c", {}, common_state({"*": OFF}, version="0.27.1"))
    inner = write_torch_dist(
        tmp_path / "inner",
        {"none": torch.ones(1)},
        args=None,
        extra_objects={
            f"{LAYER}self_attention.linear_proj./shard_0_1": [
                {"quantizer_state": {"weight_quantizer": properties((4, 3)), "input_quantizer": properties((4, 3))}}
            ],
            "decoder.layers.1/shard_0_1": [
                {
                    ".mlp.linear_fc1.weight_quantizer": {"quantizer_state": {"is_sequential_quantizer": True}},
                    ".mlp.linear_fc1.weight_quantizer.0": {"quantizer_state": properties(4, block_sizes={-1: 128})},
                    ".mlp.linear_fc1.weight_quantizer.1": {"quantizer_state": properties((4, 3))},
                }
            ],
        },
    )
    for name in (".metadata", "__0_0.distcp"):
        shutil.copy(inner / name, folder / "modelopt_state" / name)
    found = scheme_in(folder)
    assert found.linear(PROJ).scheme is Scheme.FP8
    assert found.linear(module_name("decoder.layers.1.mlp.linear_fc1")).scheme is Scheme.W4A8_AWQ
    assert found.linear(LINEARS[0]).scheme is Scheme.NONE


def test_common_state_as_a_record(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "c")
    inner = write_torch_dist(
        tmp_path / "inner",
        {"none": torch.ones(1)},
        args=None,
        extra_objects={"common_state/shard_0_1": [common_state({"*weight_quantizer": FP8})]},
    )
    (inner / "common.pt").unlink()
    shutil.copytree(inner, folder / "modelopt_state")
    assert scheme_in(folder).overall(LINEARS) is Scheme.FP8


def test_legacy_files(tmp_path: Path) -> None:
    """The state is in every rank's file, with the quantisers of its own layers, numbered from 0."""
    args = {"num_layers": 2, "pipeline_model_parallel_size": 2, "tensor_model_parallel_size": 1}
    args |= {"untie_embeddings_and_output_weights": True}
    for stage in range(2):
        bits = [(4, 3), 8][stage]
        state = properties(bits, axis=[None, 0][stage])
        quantizers = {f"{LAYER}mlp.linear_fc2.weight_quantizer": state}
        common = common_state({"*": OFF}, metadata={"quantizer_state": quantizers})
        model = {f"{LAYER}mlp.linear_fc2.weight": torch.ones(4, 4)}
        model |= {"embedding.word_embeddings.weight": torch.ones(4, 4)} if stage == 0 else {}
        model |= {"decoder.final_layernorm.weight": torch.ones(4)} if stage else {}
        model |= {"output_layer.weight": torch.ones(4, 4)} if stage else {}
        folder = tmp_path / "c" / f"mp_rank_00_{stage:03d}"
        folder.mkdir(parents=True)
        rank = {"model": model, "args": argparse.Namespace(**args), "iteration": 1, "checkpoint_version": 3.0}
        torch.save({**rank, "modelopt_state": common}, folder / "model_optim_rng.pt")
    found = scheme_in(tmp_path / "c")
    name = "decoder.layers.{layer}.mlp.linear_fc2"
    assert [found.linear(ModuleName(name, layer)).scheme for layer in (0, 1)] == [Scheme.FP8, Scheme.INT8_WO]


@pytest.mark.parametrize(
    ("common", "message"),
    [
        ([1, 2], "is missing, or a list; expected ModelOpt's dictionary"),
        ({"modelopt_version": "0.39"}, "has no modelopt_state_dict; it holds modelopt_version"),
        ({"modelopt_state_dict": [["quantize"]]}, "a mode of modelopt_state_dict is"),
        (common_state(7), "quant_cfg is a int"),
        (common_state([{"enable": False}]), "an entry of quant_cfg without a quantizer_name"),
        (common_state({3: FP8}), "a pattern of quant_cfg that is a int"),
        (common_state({"*": "fp8"}), "settings of a quantiser are 'fp8'"),
        (common_state({"RowParallelLinear": {"*": FP8}}), "modules of the class 'RowParallelLinear'"),
        (common_state({f"*{i}": OFF for i in range(5000)}), "has 5000 entries"),
    ],
)
def test_states_of_no_release(tmp_path: Path, common: Any, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        scheme_in(checkpoint(tmp_path / "c", common=common))


@pytest.mark.parametrize(
    ("quantizers", "message"),
    [
        ([], "modelopt_quantizer_state is a list"),
        ({"weight_quantizer": 3}, "'weight_quantizer' has no dictionary"),
        ({"weight_quantizer": {"_num_bits": "x"}}, "number of bits is 'x'"),
    ],
)
def test_states_of_modules_of_no_release(tmp_path: Path, quantizers: Any, message: str) -> None:
    states = {
        f"decoder.layers.{layer}.mlp.linear_fc1._extra_state/shard_0_1": modelopt_state(quantizers) for layer in (0, 1)
    }
    with pytest.raises(ExportError, match=rf"(?s)2 faults.*layers\.0.*{message}.*layers\.1"):
        scheme_in(checkpoint(tmp_path / "c", states, common_state({})))


def test_experts_of_a_grouped_linear(tmp_path: Path) -> None:
    key = "decoder.layers.0.mlp.experts.experts.linear_fc1"
    alike = {f"weight_quantizer.{expert}": properties((4, 3)) for expert in range(3)}
    name = f"{key}._extra_state/shard_0_3"
    found = scheme_in(checkpoint(tmp_path / "a", {name: modelopt_state(alike)}, common_state({})))
    assert found.linear(module_name(f"{key.replace('experts.linear', 'experts.0.linear')}")).scheme is Scheme.FP8
    alike["weight_quantizer.1"] = properties((4, 3), axis=0)
    with pytest.raises(ExportError, match="the experts' weight_quantizer differ"):
        scheme_in(checkpoint(tmp_path / "b", {name: modelopt_state(alike)}, common_state({})))


class Evil:
    def __reduce__(self) -> Any:
        import os

        return os.system, ("false",)


def test_code_in_the_state(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"refused: it names posix\.system"):
        scheme_in(checkpoint(tmp_path / "c", common=common_state({"*": Evil()})))


FC1 = "decoder.layers.3.mlp.linear_fc1"


@pytest.mark.parametrize(
    ("name", "module", "quantizer", "quantity", "number"),
    [
        (f"{FC1}.weight_quantizer._amax", FC1, Quantizer.WEIGHT, Quantity.AMAX, None),
        (f"{FC1}.weight_quantizer.1._amax", FC1, Quantizer.WEIGHT, Quantity.AMAX, 1),
        (f"{FC1}.input_quantizer._amax", FC1, Quantizer.INPUT, Quantity.AMAX, None),
        (f"{FC1}.input_quantizer._pre_quant_scale", FC1, Quantizer.INPUT, Quantity.PRE_QUANT_SCALE, None),
        (f"{FC1}.weight_quantizer._scale", FC1, Quantizer.WEIGHT, Quantity.SCALE, None),
        (f"{FC1}.weight_quantizer._double_scale", FC1, Quantizer.WEIGHT, Quantity.DOUBLE_SCALE, None),
        (f"{FC1}.weight_quantizer._global_amax", FC1, Quantizer.WEIGHT, Quantity.GLOBAL_AMAX, None),
        (f"{FC1}.weight_quantizer.svdquant_lora_a", FC1, Quantizer.WEIGHT, Quantity.SVDQUANT_A, None),
        (f"{FC1}.weight_quantizer._other", FC1, Quantizer.WEIGHT, None, None),
        (f"{FC1}.layer_norm_input_quantizer._amax", FC1, Quantizer.NORM_INPUT, Quantity.AMAX, None),
        (
            "decoder.final_layernorm.input_quantizer._amax",
            "decoder.final_layernorm",
            Quantizer.NORM_INPUT,
            Quantity.AMAX,
            None,
        ),
        ("a.core_attention.k_bmm_quantizer._amax", "a.core_attention", Quantizer.KEY, Quantity.AMAX, None),
        ("a.linear_qkv.output_quantizer._amax", "a.linear_qkv", Quantizer.OUTPUT, Quantity.AMAX, None),
        ("a.p_bmm_quantizer._amax", "a", Quantizer.OTHER, Quantity.AMAX, None),
    ],
)
def test_names(name: str, module: str, quantizer: Quantizer, quantity: Quantity | None, number: int | None) -> None:
    found = quantizer_tensor(name)
    assert found is not None and str(found.module) == module
    assert (found.quantizer, found.quantity, found.number) == (quantizer, quantity, number)
    assert found.concerns_linear == (quantizer is not Quantizer.NORM_INPUT)


@pytest.mark.parametrize("name", [f"{FC1}.weight", f"{FC1}.weight_v", "quantizer._amax", f"{FC1}._extra_state"])
def test_tensors_of_no_quantiser(name: str) -> None:
    assert quantizer_tensor(name) is None


def test_modules_of_experts() -> None:
    pattern = "decoder.layers.{layer}.mlp.experts.experts.{expert}.linear_fc1"
    for name, layer, expert in (
        ("decoder.layers.3.mlp.experts.experts.5.linear_fc1", 3, 5),
        ("decoder.layers.mlp.experts.experts.linear_fc1", -1, -1),
        ("decoder.layers.3.mlp.experts.local_experts.5.linear_fc1", 3, 5),
        ("decoder.layers.3.mlp.experts.linear_fc1", 3, -1),
    ):
        assert module_name(name) == ModuleName(pattern, layer, expert)
    shared = "decoder.layers.3.mlp.shared_experts.linear_fc1"
    assert str(module_name(shared)) == shared


def test_a_nemo_archive(tmp_path: Path) -> None:
    """The folder may be a member of the archive beside the weights."""
    from dist_export.checkpoint.modelopt_files import read_modelopt_files

    folder = checkpoint(tmp_path / "c", common=common_state({"*weight_quantizer": FP8}))
    archive = pack(folder, tmp_path / "c.nemo")
    index = open_checkpoint(folder).index
    index.folder = archive
    found = read_modelopt_files(index)
    assert found is not None and found.version == "0.39.0"
