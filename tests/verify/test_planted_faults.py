"""Faults of rules, plans and executors, in outputs whose manifests agree with them: rebuilding names each."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from msgspec.structs import replace
from support.small_models import LLAMA, NEMOTRON, SmallModel, small_model
from verify.faulty import Tensors, adopt_the_plan, change, export_to, messages, save, verify

from dist_export.convert import execute, numpy_arithmetic
from dist_export.errors import ExportError
from dist_export.families import llama as family
from dist_export.models.logical import LogicalModel
from dist_export.models.rules import Input, SourceRule
from dist_export.models.shard_ops import Slice, SliceKeyValueHeads, TensorParallel
from dist_export.models.value_ops import ValueOp
from dist_export.targets.huggingface.target import HuggingFaceOptions
from dist_export.targets.trtllm import tables
from dist_export.targets.trtllm.target import TrtllmOptions

VOCABULARY = {"vocab_size": 61}  # of 64 rows: with tp 2 the last of 62 is padding
QKV = "transformer.layers.{}.attention.qkv.weight"


@pytest.fixture(scope="module")
def llama() -> SmallModel:
    return small_model(LLAMA, num_layers=4)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, llama: SmallModel) -> Path:
    return save(tmp_path_factory.mktemp("llama") / "checkpoint", llama)


@pytest.fixture(scope="module")
def nemotron(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = small_model(NEMOTRON)
    for name, tensor in model.tensors.items():
        if name.endswith(("norm_weight", "norm.weight")):
            tensor.copy_((tensor * 8).round() / 64)  # few bits, so that adding one is exact, twice too
    return save(tmp_path_factory.mktemp("nemotron") / "checkpoint", model)


def swap(first: str, second: str) -> Callable[[Tensors], None]:
    """Exchange two tensors of every file that has both."""

    def edit(files: Tensors) -> None:
        for tensors in files.values():
            if first in tensors and second in tensors:
                tensors[first], tensors[second] = tensors[second], tensors[first]

    return edit


def swap_layers(files: Tensors) -> None:
    """Layers 0 and 1, all tensors."""
    for name in list(files["rank0.safetensors"]):
        if ".layers.0." in name:
            swap(name, name.replace(".layers.0.", ".layers.1."))(files)


def shift_layers(files: Tensors) -> None:
    """Every layer holds the one before it, the first the last."""
    for tensors in files.values():
        for name in [name for name in tensors if ".layers.0." in name]:
            names = [name.replace(".layers.0.", f".layers.{n}.") for n in range(4)]
            values = [tensors[each] for each in names]
            tensors.update(zip(names, [values[-1], *values[:-1]], strict=True))


def duplicate_shard(files: Tensors) -> None:
    files["rank1.safetensors"][QKV.format(2)] = files["rank0.safetensors"][QKV.format(2)]


def query_and_key_swapped(files: Tensors) -> None:
    """In the fused tensor of tp rank 0: 16 query rows, 8 key rows, 8 value rows."""
    fused = files["rank0.safetensors"][QKV.format(1)]
    fused[:] = np.concatenate([fused[16:24], fused[:16], fused[24:]])


def interleave(rows: np.ndarray, size: int = 8) -> np.ndarray:
    """Rows of every head: halves become pairs."""
    heads = rows.reshape(-1, 2, size // 2, rows.shape[-1])
    return heads.transpose(0, 2, 1, 3).reshape(rows.shape)


def rotary_interleaved(files: Tensors) -> None:
    for tensors in files.values():
        fused = tensors[QKV.format(3)]
        fused[:24] = interleave(fused[:24])


def padding_leaked(files: Tensors) -> None:
    files["rank1.safetensors"]["lm_head.weight"][-1] = 0x3F80


FAULTS = {
    "two layers swapped": (
        swap_layers,
        r"rank1.safetensors: transformer.layers.0.mlp.proj.weight: it holds the tensor of layer 1; \d+ of 768 elements",
        28,
    ),
    "every layer off by one": (
        shift_layers,
        r"rank0.safetensors: transformer.layers.2.attention.qkv.weight: it holds the tensor of layer 1; .* differ from "
        r"decoder.layers.self_attention.linear_qkv.weight\[2\] \(layer 2\)",
        56,
    ),
    "a shard twice": (
        duplicate_shard,
        r"rank1.safetensors: transformer.layers.2.attention.qkv.weight: it holds the shard of tp rank 0; ",
        1,
    ),
    "query and key swapped": (
        query_and_key_swapped,
        r"rank0.safetensors: transformer.layers.1.attention.qkv.weight: query and key are swapped; \d+ of 1024 "
        r"elements differ from .* the first at layers.1.attention.query.weight\[0, 0\], here row 0, column 0: expect",
        1,
    ),
    "gate and up swapped": (
        swap("transformer.layers.0.mlp.fc.weight", "transformer.layers.0.mlp.gate.weight"),
        r"rank0.safetensors: transformer.layers.0.mlp.fc.weight: gate and up are swapped: "
        r"it holds layers.0.mlp.up.weight; ",
        4,
    ),
    "norms of a layer swapped": (
        swap("transformer.layers.1.input_layernorm.weight", "transformer.layers.1.post_layernorm.weight"),
        r"rank1.safetensors: transformer.layers.1.input_layernorm.weight: it holds layers.1.mlp.norm.weight; ",
        4,
    ),
    "rotary halves interleaved": (
        rotary_interleaved,
        r"rank1.safetensors: transformer.layers.3.attention.qkv.weight: the rotary halves of query and key are "
        r"interleaved within each head; ",
        2,
    ),
    "nothing written": (
        lambda files: files["rank0.safetensors"]["transformer.layers.1.mlp.fc.weight"].fill(0),
        r"rank0.safetensors: transformer.layers.1.mlp.fc.weight: it is all zero; ",
        1,
    ),
    "one element of the padding not zero": (
        lambda files: files["rank1.safetensors"]["lm_head.weight"][-1:, 5].fill(0x3F80),
        r"rank1.safetensors: lm_head.weight: 1 of 992 elements should be zero, the first at row 30, column 5: ",
        1,
    ),
    "padding rows not zero": (
        padding_leaked,
        r"rank1.safetensors: lm_head.weight: 32 of 992 elements should be zero, the first at row 30, column 0: "
        r"expected 0x0000, found 0x3f80",
        1,
    ),
    "a copy of a norm on one rank": (
        lambda files: files["rank1.safetensors"]["transformer.ln_f.weight"].fill(0x3F80),
        r"rank1.safetensors: transformer.ln_f.weight: 3[0-2] of 32 elements differ from decoder.final_layernorm.weight",
        1,
    ),
    "one element wrong": (
        lambda files: files["rank1.safetensors"]["transformer.layers.2.mlp.proj.weight"].__setitem__((5, 3), 0x4049),
        r"transformer.layers.2.mlp.proj.weight: (?!.*holds)1 of 768 elements differ from .* the first at "
        r"layers.2.mlp.down.weight\[5, 27\], here row 5, column 3: expected 0x.{4}, found 0x4049",
        1,
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_the_rebuild_names_the_tensor_and_the_mistake(name: str, checkpoint: Path, tmp_path: Path) -> None:
    edit, expected, num_faults = FAULTS[name]
    output = export_to(checkpoint, tmp_path / "out", TrtllmOptions(tp_size=2), overrides=VOCABULARY)
    change(output, edit)
    assert verify(checkpoint, output, "checksums", "coverage").ok, "a manifest that agrees with itself shows nothing"
    report = verify(checkpoint, output)
    found = messages(report)
    assert any(re.search(f"rebuild: .*{expected}", each) for each in found), "\n".join(found)
    assert len(found) == num_faults, "\n".join(found)


def test_padding_rows_of_the_checkpoint_that_leak_are_recognised(
    checkpoint: Path, llama: SmallModel, tmp_path: Path
) -> None:
    output = export_to(checkpoint, tmp_path / "out", TrtllmOptions(tp_size=2), overrides=VOCABULARY)
    row = llama.tensors["output_layer.weight"][61].view(torch.int16).numpy().view(np.uint16)
    change(output, lambda files: files["rank1.safetensors"]["lm_head.weight"].__setitem__(-1, row))
    (fault,) = messages(verify(checkpoint, output))
    assert "lm_head.weight: the checkpoint's padding rows of the vocabulary leaked into rows that must be zero" in fault


def test_one_flipped_bit_is_named_with_its_byte_and_mask(checkpoint: Path, tmp_path: Path) -> None:
    output = export_to(checkpoint, tmp_path / "out", TrtllmOptions(tp_size=2))
    path = output / "rank1.safetensors"
    place = path.stat().st_size - 999
    data = bytearray(path.read_bytes())
    data[place] ^= 0x10
    path.write_bytes(data)
    (crc,) = messages(verify(checkpoint, output, "checksums"))
    assert re.match(r"checksums: rank1.safetensors: \S+: was changed: its CRC-32 is", crc)
    (fault,) = messages(verify(checkpoint, output, "rebuild"))
    assert f"one bit is flipped: mask 0x10 at byte {place}; 1 of " in fault


def off_by_one_layer(find: Callable[..., object]) -> Callable[..., object]:
    def wrong(self: LogicalModel, name: str, *, layer: int = -1, expert: int = -1) -> object:
        return find(self, name, layer=(layer + 1) % 4 if layer >= 0 else layer, expert=expert)

    return wrong


def modulo_heads(self: SliceKeyValueHeads, view, tp, config):
    """Heads dealt out in turn instead of repeated in a row."""
    rows = view.shape[0] // config.num_query_groups
    return view.narrow(0, tp.rank % config.num_query_groups * rows, rows)


def swapped_table(embedding: tables.EmbeddingSharding):
    """The Llama rules that take gate for up, and the other way round."""

    def other(part: Input) -> Input:
        name = part.logical.replace(".gate.", ".TMP.").replace(".up.", ".gate.").replace(".TMP.", ".up.")
        return replace(part, logical=name)

    return tuple(replace(rule, inputs=tuple(map(other, rule.inputs))) for rule in family.engine_rules(embedding))


WRONG_CODE = {
    "off-by-one layer in the plan": (
        lambda patch: patch.setattr(LogicalModel, "find", off_by_one_layer(LogicalModel.find)),
        r"transformer.layers.0.mlp.fc.weight: it holds the tensor of layer 1; ",
    ),
    "key/value heads repeated in the wrong order": (
        lambda patch: patch.setattr(SliceKeyValueHeads, "take", modulo_heads),
        r"rank1.safetensors: transformer.layers.0.attention.qkv.weight: its key/value heads are in the wrong order: "
        r"they are those of tp rank [23]; .* the first at layers.0.attention.key.weight\[0, 0\], here row 8, column 0",
    ),
    "gate and up swapped in the target's table": (
        lambda patch: patch.setitem(
            family.LLAMA.architectures, "trtllm", (replace(family.ENGINE, rules=swapped_table),)
        ),
        r"transformer.layers.3.mlp.gate.weight: gate and up are swapped: it holds layers.3.mlp.gate.weight; ",
    ),
    "query and key swapped in the source's table": (
        lambda patch: patch.setattr(LogicalModel, "__init__", swapped_logical(LogicalModel.__init__)),
        r"transformer.layers.0.attention.qkv.weight: key and value are swapped; ",
    ),
    "rows turned over by the executor": (
        lambda patch: patch.setattr(execute, "_assembled", upside_down(execute._assembled)),
        r"rank1.safetensors: transformer.layers.0.mlp.proj.weight: \d+ of 384 elements differ from "
        r"decoder.layers.mlp.linear_fc2.weight\[0\] \(layer 0\), the first at layers.0.mlp.down.weight\[0, ",
    ),
}


def swapped_logical(init: Callable[..., None]) -> Callable[..., None]:
    """Source rules that call key what is the value, and the other way round."""

    def rename(name: str) -> str:
        return name.replace(".key.", ".TMP.").replace(".value.", ".key.").replace(".TMP.", ".value.")

    def wrong(self: LogicalModel, catalog, rules: tuple[SourceRule, ...], config) -> None:
        renamed = [
            replace(rule, logical=tuple(map(rename, rule.logical))) for rule in rules
        ]
        init(self, catalog, tuple(renamed), config)

    return wrong


def upside_down(assembled: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    """Blocks that do not begin at the first column get their rows in reverse order."""

    def wrong(parts, rows, columns, buffer) -> np.ndarray:
        block = assembled(parts, rows, columns, buffer)
        return block[::-1] if columns[0] else block

    return wrong


@pytest.mark.parametrize("name", WRONG_CODE)
def test_right_tables_find_what_wrong_code_wrote(
    name: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant, expected = WRONG_CODE[name]
    with monkeypatch.context() as patch:
        plant(patch)
        output = export_to(checkpoint, tmp_path / "out", TrtllmOptions(tp_size=4))
    before = messages(verify(checkpoint, output, "checksums"))
    if "executor" in name:
        assert not before
    else:  # the cheapest level: the plan recorded is not the one that the rules give
        assert before[0].startswith("plan: export_manifest.json: the export was made by another plan (digest")
    adopt_the_plan(checkpoint, output)
    assert verify(checkpoint, output, "checksums", "coverage").ok
    found = messages(verify(checkpoint, output, "rebuild"))
    assert any(re.search(expected, each) for each in found), "\n".join(found)


def test_a_duplicated_shard_is_refused_by_the_plan_itself(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    take = Slice.take

    def first_rank(self: Slice, view, tp, config):
        return take(self, view, TensorParallel(0, tp.size), config)

    with monkeypatch.context() as patch, pytest.raises(ExportError, match=r"linear_fc2.weight\[0\]: 768 of its 1536 "):
        patch.setattr(Slice, "take", first_rank)
        export_to(checkpoint, tmp_path / "out", TrtllmOptions(tp_size=2))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("target", [TrtllmOptions(tp_size=2), HuggingFaceOptions()], ids=["trtllm", "hf"])
@pytest.mark.parametrize(
    "wrong, expected",
    [
        (lambda values: values + np.float32(2), "with one added twice, they must be with one added"),
        (lambda values: values, r"stored as in the checkpoint, they must be with one added \(the \+1 is missing\)"),
    ],
    ids=["doubled", "missing"],
)
def test_the_one_of_zero_centred_norms(
    target: object, wrong: object, expected: str, nemotron: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setitem(numpy_arithmetic._OPERATIONS, ValueOp.ADD_ONE, wrong)
        output = export_to(nemotron, tmp_path / "out", target)
    if isinstance(target, HuggingFaceOptions):  # its norms are zero-centred as well: nothing is computed
        assert verify(nemotron, output).ok
        change(output, lambda files: add_one(files["model.safetensors"]))
        expected = "its norm weights are with one added, they must be stored as in the checkpoint"
    found = messages(verify(nemotron, output))
    norms = [each for each in found if re.search(f"norm.weight: .*{expected}", each) or "ln_f" in each]
    assert len(norms) == len(found) == (10 if isinstance(target, TrtllmOptions) else 5), "\n".join(found)


def add_one(tensors: dict[str, np.ndarray]) -> None:
    """To every norm weight, in bfloat16."""
    for name, values in tensors.items():
        if name.endswith("norm.weight"):
            plain = torch.from_numpy(values.view(np.int16)).view(torch.bfloat16)
            values[:] = (plain + 1).view(torch.int16).numpy().view(np.uint16)


MIXTRAL = Path(__file__).parents[1] / "conformance" / "checkpoints" / "mixtral_core_0_16_pp2ep2"
STACKED = "transformer.layers.{}.mlp.proj.weight"


def test_two_experts_swapped_where_they_are_stacked(tmp_path: Path) -> None:
    output = export_to(MIXTRAL, tmp_path / "out", TrtllmOptions(tp_size=2))

    def edit(files: Tensors) -> None:
        stacked = files["rank1.safetensors"][STACKED.format(1)]
        stacked[[1, 3]] = stacked[[3, 1]]

    change(output, edit)
    (fault,) = messages(verify(MIXTRAL, output))
    assert f"rank1.safetensors: {STACKED.format(1)}: experts 1 and 3 are swapped; " in fault
    assert re.search(r"fc2.weight\S* \(layer 1, expert 1\), the first at layers.1.experts.1.down.weight\[0, ", fault)


def test_experts_of_another_rank_and_of_another_layer(tmp_path: Path) -> None:
    output = export_to(MIXTRAL, tmp_path / "out", TrtllmOptions(tp_size=2, moe_ep_size=2))

    def edit(files: Tensors) -> None:
        first, second = files["rank0.safetensors"], files["rank1.safetensors"]
        second[STACKED.format(0)] = first[STACKED.format(0)]
        second[STACKED.format(2)] = second[STACKED.format(3)]

    change(output, edit)
    found = messages(verify(MIXTRAL, output))
    assert [re.search(r"layers.*?; ", each)[0] for each in found] == [
        "layers.0.mlp.proj.weight: it holds the shard of tp rank 0; ",
        "layers.2.mlp.proj.weight: it holds the tensor of layer 3; ",
    ]


def test_two_experts_swapped_where_each_has_a_name(tmp_path: Path) -> None:
    output = export_to(MIXTRAL, tmp_path / "out", HuggingFaceOptions())
    name = "model.layers.0.block_sparse_moe.experts.{}.w2.weight"
    change(output, swap(name.format(0), name.format(2)))
    found = messages(verify(MIXTRAL, output))
    assert [each.split("; ")[0] for each in found] == [
        f"rebuild: model.safetensors: {name.format(0)}: it holds expert 2",
        f"rebuild: model.safetensors: {name.format(2)}: it holds expert 0",
    ]
