"""Hugging Face exports equal, tensor by tensor, the model that each checkpoint came from."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from support.conformance import CHECKPOINTS
from support.exports import config_of, export, fingerprints, run_command

HERE = Path(__file__).parent
EXPECTED = {path.stem: json.loads(path.read_text()) for path in sorted((HERE / "expected_huggingface").glob("*.json"))}
#: What transformers writes of itself, of training, or of a tokenizer that a checkpoint does not hold.
NOT_COMPARED = {
    *("transformers_version", "dtype", "bos_token_id", "eos_token_id", "pad_token_id", "initializer_range"),
    "pretraining_tp",
    *("reorder_and_upcast_attn", "scale_attn_by_inverse_layer_idx", "output_router_logits", "router_aux_loss_coef"),
    *("router_jitter_noise", "head_dim", "layer_types", "qk_head_dim", "aux_loss_alpha", "seq_aux"),
    *(f"summary_{name}" for name in ("activation", "first_dropout", "proj_to_labels", "type", "use_proj")),
}
CASES = [pytest.param(HERE / "checkpoints" / c, name, id=c) for c, name in CHECKPOINTS.items()]
CASES += [pytest.param(e["options"], name, id=name) for name, e in EXPECTED.items() if "options" in e]


def tensors_in(folder: Path) -> dict[str, dict[str, object]]:
    return {name: t for path in folder.glob("*.safetensors") for name, t in fingerprints(path).items()}


@pytest.mark.parametrize("checkpoint, name", CASES)
def test_every_tensor_and_field_equals_the_original_model(checkpoint, name, tmp_path, megatron_checkpoint):
    if isinstance(checkpoint, dict):
        checkpoint = megatron_checkpoint(**checkpoint)
    output = export(checkpoint, tmp_path / "out", "--target", "hf")
    assert tensors_in(output) == EXPECTED[name]["tensors"]
    config, written = EXPECTED[name]["config"], config_of(output)
    wanted = {key: value for key, value in config.items() if key not in NOT_COMPARED}
    assert {key: written.get(key) for key in wanted} == wanted
    assert written["torch_dtype"] == config["dtype"]


def test_several_files_hold_the_same_tensors_and_an_index_that_names_them(tmp_path):
    checkpoint = HERE / "checkpoints" / "llama_core_0_16_tp2pp2"
    output = export(checkpoint, tmp_path / "out", "--target", "hf", "--max-file-size", "100k", "--num-processes", 3)
    assert tensors_in(output) == EXPECTED["llama"]["tensors"]
    index = json.loads((output / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in output.glob("*.safetensors"))
    assert files == [f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)]
    assert len(files) > 2
    for file in files:
        assert set(fingerprints(output / file)) == {n for n, f in index["weight_map"].items() if f == file}
    assert index["metadata"]["total_size"] == sum(
        entry["num_bytes"] for file in files for entry in stored_sizes(output / file)
    )


def stored_sizes(path: Path) -> list[dict[str, int]]:
    """Sizes in bytes of the tensors of a file, from its own header."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    spans = [entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"]
    return [{"num_bytes": end - start} for start, end in spans]


TIMED = {"export_manifest.json", "export_report.html"}
"""Files that say how long the export took."""


def test_both_targets_in_one_pass_equal_the_single_ones(tmp_path):
    checkpoint = HERE / "checkpoints" / "gpt2_core_0_16_tp2"
    both = export(checkpoint, tmp_path / "both", "--target", "hf", "--target", "trtllm", "--tp", 2)
    single_hf = export(checkpoint, tmp_path / "hf", "--target", "hf")
    single_trtllm = export(checkpoint, tmp_path / "trtllm", "--tp", 2)
    for one, other in ((both / "hf", single_hf), (both / "trtllm", single_trtllm)):
        files = sorted(path.name for path in other.iterdir() if path.name not in TIMED)
        assert files == sorted(path.name for path in one.iterdir() if path.name not in TIMED)
        assert all((one / name).read_bytes() == (other / name).read_bytes() for name in files)


@pytest.mark.parametrize("options", [(), ("--max-file-size", "150k")], ids=["one file", "several files"])
@pytest.mark.parametrize("checkpoint", ["llama_core_0_16_tp2pp2", "gpt2_core_0_16_tp2", "mixtral_core_0_16_pp2ep2"])
def test_transformers_loads_it_with_nothing_missing_or_unexpected(checkpoint, options, tmp_path):
    transformers = pytest.importorskip("transformers")
    output = export(HERE / "checkpoints" / checkpoint, tmp_path / "out", "--target", "hf", *options)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(output, output_loading_info=True, dtype="auto")
    assert {kind: list(names) for kind, names in info.items() if names} == {}
    assert model.dtype == torch.bfloat16
    tokens = torch.arange(8)[None]
    assert torch.isfinite(model(input_ids=tokens).logits).all()


def test_sha256_of_the_files_is_in_the_manifest_when_asked_for(tmp_path):
    checkpoint = HERE / "checkpoints" / "llama_core_0_16_tp2pp2"
    output = export(checkpoint, tmp_path / "out", "--target", "hf", "--sha256", "--max-file-size", "200k")
    files = json.loads((output / "export_manifest.json").read_text())["files"]
    assert len(files) == 2
    for name, entry in files.items():
        assert entry["sha256"] == hashlib.sha256((output / name).read_bytes()).hexdigest()
    assert run_command("verify", checkpoint, output, "--sha256").returncode == 0
