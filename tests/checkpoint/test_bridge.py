"""Megatron-Bridge and NeMo 2 folders against the same model in Megatron-LM's torch_dist."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.exports import run_command
from support.other_formats import exported, write_bridge, write_nemo2
from support.small_models import LLAMA, NEMOTRON, small_model
from support.torch_dist import write_torch_dist

from dist_export import api
from dist_export.checkpoint import bridge
from dist_export.checkpoint.index import CheckpointIndex
from dist_export.checkpoint.open import checkpoint_of, open_checkpoint
from dist_export.errors import ExportError
from dist_export.families.registry import choose_family
from dist_export.models.config import RopeScaling

torch = pytest.importorskip("torch")
STYLES = {"llama": LLAMA, "nemotron": NEMOTRON}


@pytest.fixture(scope="module", params=STYLES)
def style(request: pytest.FixtureRequest) -> dict[str, Any]:
    return STYLES[request.param]


def model_of(checkpoint: Path) -> Any:
    return api.open_model(api.Source(checkpoint=checkpoint)).resolved.config


def change_yaml(path: Path, *keys: str, **changes: Any) -> None:
    document = yaml.safe_load(path.read_text())
    inner = document
    for key in keys:
        inner = inner[key]
    inner.update(changes)
    path.write_text(yaml.safe_dump(document))


def test_same_exports_as_torch_dist(tmp_path: Path, style: dict[str, Any]) -> None:
    model = small_model(style, add_qkv_bias=False)
    plain = exported(write_torch_dist(tmp_path / "plain", model.tensors, args=model.args), tmp_path / "a", "--tp", 2)
    assert exported(write_bridge(tmp_path / "bridge", model), tmp_path / "b", "--tp", 2) == plain
    assert exported(write_nemo2(tmp_path / "nemo2", model), tmp_path / "c", "--tp", 2) == plain


@pytest.mark.parametrize("writer", [write_bridge, write_nemo2])
def test_the_same_configuration_as_from_saved_arguments(tmp_path: Path, writer: Any, style: dict[str, Any]) -> None:
    model = small_model(style)
    plain = model_of(write_torch_dist(tmp_path / "plain", model.tensors, args=model.args))
    assert model_of(writer(tmp_path / "other", model)) == plain


def test_nested_configuration(tmp_path: Path) -> None:
    model = small_model(LLAMA)
    nested = write_bridge(tmp_path / "nested", model, nested=True)
    assert model_of(nested) == model_of(write_bridge(tmp_path / "flat", model))


def test_what_is_recognised(tmp_path: Path) -> None:
    model = small_model(LLAMA)
    checkpoint = open_checkpoint(write_bridge(tmp_path / "bridge", model, iteration=7))
    assert (checkpoint.index.format, checkpoint.index.folder.name) == ("Megatron-Bridge (torch_dist)", "iter_0000007")
    folder = write_nemo2(tmp_path / "m=1-last", model)
    for path in (folder, folder / "weights"):
        checkpoint = open_checkpoint(path)
        assert checkpoint.index.format == "NeMo 2 (torch_dist)"
        assert (checkpoint.iteration, set(checkpoint.index.tensors)) == (10, set(model.tensors))


def test_iteration_without_a_saved_one(tmp_path: Path) -> None:
    top = write_bridge(tmp_path / "bridge", small_model(LLAMA), iteration=7)
    (top / "iter_0000007" / "common.pt").unlink()
    assert open_checkpoint(top).iteration == 7


def test_rope_scaling(tmp_path: Path) -> None:
    model = small_model(LLAMA)
    scaled = write_bridge(tmp_path / "a", model, rope_scaling=True, rope_scaling_factor=32.0)
    opened = api.open_model(api.Source(checkpoint=scaled))
    assert opened.resolved.config.rope_scaling == RopeScaling("llama3", 32.0)
    assert not any("pretrain_gpt" in note for note in opened.resolved.notes)
    linear = write_bridge(tmp_path / "b", model, seq_len_interpolation_factor=4.0)
    assert model_of(linear).rope_scaling == RopeScaling("linear", 4.0)
    llama31 = {"scale_factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "old_context_len": 4096}
    nemo = write_nemo2(tmp_path / "c", model, **llama31)
    assert model_of(nemo).rope_scaling == RopeScaling("llama3", 8.0, original_max_position_embeddings=4096)
    both = write_bridge(tmp_path / "d", model, rope_scaling=True, seq_len_interpolation_factor=4.0)
    with pytest.raises(ExportError, match=r"both rope_scaling and seq_len_interpolation_factor"):
        model_of(both)


def test_vocabulary_of_a_provider(tmp_path: Path) -> None:
    model = small_model(LLAMA)
    assert model_of(write_bridge(tmp_path / "a", model, vocab_size=61, should_pad_vocab=True)).vocab_size == 61
    opened = api.open_model(api.Source(checkpoint=write_bridge(tmp_path / "b", model, vocab_size=61)))
    assert opened.resolved.config.vocab_size == 61  # pads to the 64 rows that are there
    opened = api.open_model(api.Source(checkpoint=write_bridge(tmp_path / "c", model, vocab_size=7)))
    assert opened.resolved.config.vocab_size == 7
    wrong = write_bridge(tmp_path / "d", model, vocab_size=65, should_pad_vocab=True)
    opened = api.open_model(api.Source(checkpoint=wrong))
    assert opened.resolved.config.vocab_size == 64
    assert any("pads to 128" in note for note in opened.resolved.notes)


def test_sizes_that_providers_leave_out(tmp_path: Path) -> None:
    model = small_model(LLAMA)
    top = write_bridge(tmp_path / "a", model)
    config = top / "iter_0000010" / "run_config.yaml"
    change_yaml(config, "model", kv_channels=None)
    assert model_of(top).head_size == 8
    change_yaml(config, "model", num_query_groups=None)
    assert model_of(top).num_query_groups == 2  # the rows of linear_qkv prove it


def test_bridge_saves_gated_rows_in_order_whatever_the_configuration(tmp_path: Path) -> None:
    top = write_bridge(tmp_path / "a", small_model(LLAMA), moe_mlp_glu_interleave_size=32)
    assert model_of(top).gated
    assert "moe_mlp_glu_interleave_size" not in bridge.read_common_state(open_checkpoint(top).index)["args"]


def test_gemma_scales_its_embeddings_without_a_field_that_says_so(tmp_path: Path) -> None:
    top = write_bridge(tmp_path / "a", small_model(LLAMA))
    target = "megatron.bridge.models.gemma.gemma_provider.GemmaModelProvider2B"
    change_yaml(top / "iter_0000010" / "run_config.yaml", "model", _target_=target)
    assert model_of(top).embedding_scaling


@pytest.mark.parametrize("writer", [write_bridge, write_nemo2])
def test_gemma_2(tmp_path: Path, writer: Callable[..., Path]) -> None:
    trainer = "megatron.bridge.models.gemma.gemma2_provider.Gemma2ModelProvider"
    if writer is write_nemo2:
        trainer = "nemo.collections.llm.gpt.model.gemma2.Gemma2Config9B"
    config = {"query_pre_attn_scalar": 144, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
    function = {"_target_": "nemo.collections.llm.fn.activation.openai_gelu", "_call_": False}
    config |= {"window_size": [4095, 0], "activation_func": function, "gated_linear_unit": True}
    model = small_model(LLAMA, layernorm_zero_centered_gamma=True)
    for name in ("self_attention.linear_proj", "mlp.linear_fc2"):
        norm = model.tensors["decoder.layers.mlp.linear_fc1.layer_norm_weight"]
        model.tensors[f"decoder.layers.{name}.post_layernorm.weight"] = norm.clone()
    found = model_of(writer(tmp_path / "a", model, **config, _target_=trainer))
    assert choose_family(found).name == "gemma2"
    assert (found.embedding_scaling, found.post_norms, found.activation) == (True, True, "gelu_tanh")
    assert (found.query_pre_attn_scalar, found.window_size, found.window_layers) == (144, 4095, (1, 0))


def test_gemma_3_is_refused(tmp_path: Path) -> None:
    top = write_bridge(tmp_path / "a", small_model(LLAMA), interleaved_attn_pattern=[5, 1])
    with pytest.raises(ExportError, match=r"interleaved_attn_pattern = .* cannot be exported: .*another base"):
        model_of(top)


def test_adapters_are_refused(tmp_path: Path) -> None:
    model = small_model(LLAMA)
    name = "decoder.layers.self_attention.linear_qkv.adapter.linear_in.weight"
    model.tensors = {name: torch.zeros(2, 8, 32)}
    with pytest.raises(ExportError, match=r"holds only adapter weights .*with --base, they are then merged into it"):
        open_checkpoint(write_bridge(tmp_path / "a", model))
    with pytest.raises(ExportError, match=r"holds only adapter weights"):
        open_checkpoint(write_nemo2(tmp_path / "b", model))
    model.tensors |= small_model(LLAMA).tensors
    with pytest.raises(ExportError, match=r"run_config.yaml: says nothing of the adapters .*scale alpha / dim is not"):
        open_checkpoint(write_bridge(tmp_path / "c", model))


def test_a_save_that_did_not_finish(tmp_path: Path) -> None:
    folder = write_nemo2(tmp_path / "last", small_model(LLAMA))
    (tmp_path / "last-unfinished").write_text("")
    with pytest.raises(ExportError, match=r"did not finish: last-unfinished is still beside it"):
        open_checkpoint(folder)


def test_io_json_alone_proves_nothing(tmp_path: Path) -> None:
    folder = write_nemo2(tmp_path / "a", small_model(LLAMA))
    (folder / "context" / "model.yaml").unlink()
    assert open_checkpoint(folder).arguments is None
    with pytest.raises(ExportError, match=r"holds no training arguments.*norm_epsilon"):
        model_of(folder)


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + n)}: &{chr(98 + n)} [{', '.join(['*' + chr(97 + n)] * 9)}]\n" for n in range(12)
)
MERGE_BOMB = "a: &a {x: 1}\n" + "".join(
    f"{chr(98 + n)}: &{chr(98 + n)} {{<<: [{', '.join(['*' + chr(97 + n)] * 9)}]}}\n" for n in range(12)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: !!python/object/apply:os.system [touch /tmp/never]", "refused: it has the tag .*python/object"),
        ("model: !Llama {num_layers: 2}", "refused: it has the tag !Llama"),
        (MERGE_BOMB + "model: *l", "refused: it has merge keys"),
        (BOMB, "has no model"),
        ("model: [" + "*a," * 20_000 + "]", "refused|not plain YAML"),
        ("model: &a [" + "*a," * 20_000 + "]", "refused: more than 64 levels or 10000 aliases"),
        ("[" * 100_000, "refused: more than 64 levels|not plain YAML"),
        ("model: " + "9" * 10_000, "has no model|not plain YAML"),
        ("model: 2020-99-99", "not plain YAML"),
        ("? [a]\n: b", "not plain YAML|expected a mapping"),
        ("- 1", "expected a mapping"),
        ("model: {a: b", "not plain YAML"),
        ("model: \xff\x00", "not plain YAML"),
        ("", "expected a mapping"),
        ("model: 5", "has no model"),
        ("#" * (9 << 20), "at most 8388608 are accepted"),
    ],
)
def test_hostile_configurations(tmp_path: Path, text: str, message: str) -> None:
    top = write_bridge(tmp_path / "a", small_model(LLAMA))
    (top / "iter_0000010" / "run_config.yaml").write_bytes(text.encode("latin1"))
    with pytest.raises(ExportError, match=rf"run_config\.yaml.*({message})"):
        open_checkpoint(top)


def test_values_of_the_wrong_kind(tmp_path: Path) -> None:
    top = write_bridge(tmp_path / "a", small_model(LLAMA))
    config = top / "iter_0000010" / "run_config.yaml"
    change_yaml(config, "model", hidden_size={"_target_": "os.system"}, num_layers=["2"], rope_scaling="yes")
    with pytest.raises(ExportError, match=r"hidden_size is .*expected an integer") as caught:
        model_of(top)
    assert all(name in str(caught.value) for name in ("num_layers", "rope_scaling"))


@pytest.mark.parametrize("writer", [write_bridge, write_nemo2])
def test_processes_that_only_map_the_table(tmp_path: Path, writer: Any) -> None:
    checkpoint = open_checkpoint(writer(tmp_path / "a", small_model(LLAMA)))
    again = checkpoint_of(CheckpointIndex.from_buffer(checkpoint.index.to_bytes()))
    assert (again.arguments, again.iteration) == (checkpoint.arguments, 10)


def test_what_inspect_says(tmp_path: Path) -> None:
    top = write_bridge(tmp_path / "a", small_model(LLAMA))
    (top / "iter_0000010" / "modelopt_state").mkdir()
    said = run_command("inspect", top).stdout
    for line in ("Megatron-Bridge (torch_dist)", "quantiser state (modelopt_state)", "tokenizer files (tokenizer)"):
        assert line in said
    folder = write_torch_dist(tmp_path / "b", small_model(LLAMA).tensors, args=small_model(LLAMA).args, common="record")
    assert "torch_dist, Megatron-Core 0.19 or later" in run_command("inspect", folder).stdout
