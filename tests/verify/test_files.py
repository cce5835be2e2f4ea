"""What names, sizes, headers, documents and checksums show: faults that happen to an export after it was made."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.small_models import GPT, LLAMA, small_model
from verify.faulty import change, export_to, messages, read_manifest, save, verify, write_manifest

from dist_export.errors import ExportError
from dist_export.targets.huggingface.target import HuggingFaceOptions
from dist_export.targets.trtllm.target import TrtllmOptions
from dist_export.verify.findings import VerifyReport
from dist_export.verify.run import VerifyOptions, find_exports


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("llama") / "checkpoint", small_model(LLAMA))


@pytest.fixture(scope="module")
def made(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_to(checkpoint, tmp_path_factory.mktemp("made") / "out", TrtllmOptions(tp_size=2))


@pytest.fixture
def output(made: Path, tmp_path: Path) -> Path:
    """An export that a test may spoil."""
    return Path(shutil.copytree(made, tmp_path / "out"))


def truncate(output: Path) -> None:
    path = output / "rank1.safetensors"
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 1)


def rename_tensor(output: Path) -> None:
    path = output / "rank0.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"lm_head.weight"', b'"lm_head.wxight"'))


def edit_config(output: Path) -> None:
    config = json.loads((output / "config.json").read_text())
    config["num_attention_heads"] = 8
    config["mapping"]["tp_size"] = 4
    del config["head_size"]
    (output / "config.json").write_text(json.dumps(config))


def forget_a_tensor(output: Path) -> None:
    manifest = read_manifest(output)
    del manifest["files"]["rank0.safetensors"]["tensors"]["lm_head.weight"]
    write_manifest(output, manifest)


def exchange_tensors(output: Path) -> None:
    """Two tensors of the same kind change places in the header, their bytes stay."""
    path = output / "rank0.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    names = [f"transformer.layers.{layer}.attention.dense.weight" for layer in (0, 1)]
    first, second = (header[name]["data_offsets"] for name in names)
    header[names[0]]["data_offsets"], header[names[1]]["data_offsets"] = second, first
    text = json.dumps(header, separators=(",", ":")).encode()
    assert len(text) <= length
    path.write_bytes(data[:8] + text.ljust(length) + data[8 + length :])


def add_to_config(output: Path) -> None:
    config = json.loads((output / "config.json").read_text())
    config["use_parallel_embedding"] = 1
    config["mapping"]["auto_parallel"] = False
    (output / "config.json").write_text(json.dumps(config))


def misstate_a_tensor(output: Path) -> None:
    manifest = read_manifest(output)
    manifest["files"]["rank1.safetensors"]["tensors"]["lm_head.weight"]["dtype"] = "float16"
    write_manifest(output, manifest)


FAULTS: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "a rank file of an earlier run": (
        lambda output: shutil.copy(output / "rank0.safetensors", output / "rank2.safetensors"),
        ["checksums: rank2.safetensors: is not part of this export, left by an earlier export; a loader may take it: "
         "remove it"],
    ),
    "an index of an earlier run": (
        lambda output: (output / "model.safetensors.index.json").write_text("{}"),
        ["checksums: model.safetensors.index.json: is not part of this export; a loader may take it: remove it"],
    ),
    "a file cut short": (truncate, ["checksums: rank1.safetensors: has ", "it was cut short"]),
    "bytes appended": (
        lambda output: (output / "rank1.safetensors").open("ab").write(b"x"),
        ["checksums: rank1.safetensors: has ", "it was appended to"],
    ),
    "a missing file": (
        lambda output: (output / "rank1.safetensors").unlink(),
        ["checksums: rank1.safetensors: is missing"],
    ),
    "a file that is no safetensors": (
        lambda output: (output / "rank0.safetensors").write_bytes(
            b"\xff" * (output / "rank0.safetensors").stat().st_size
        ),
        ["rank0.safetensors: not a safetensors file"],
    ),
    "a renamed tensor": (
        rename_tensor,
        ["rank0.safetensors: lm_head.weight: is not in the file",
         "rank0.safetensors: lm_head.wxight: is in the file but not in the plan"],
    ),
    "two tensors exchanged": (
        exchange_tensors,
        ["rank0.safetensors: transformer.layers.0.attention.dense.weight: is bfloat16 ",
         "rank0.safetensors: transformer.layers.1.attention.dense.weight: is bfloat16 "],
    ),
    "more in config.json, and another type": (
        add_to_config,
        ["config.json: mapping.auto_parallel is false, which the export did not write",
         "config.json: use_parallel_embedding is 1, expected true"],
    ),
    "a manifest with another element type": (
        misstate_a_tensor, ["export_manifest.json: rank1.safetensors: lm_head.weight is not bfloat16 [32, 32] there"],
    ),
    "no config.json": (lambda output: (output / "config.json").unlink(), ["checksums: config.json: is missing"]),
    "an edited config.json": (
        edit_config,
        ["config.json: head_size is missing, expected 8",
         "config.json: mapping.tp_size is 4, expected 2",
         "config.json: num_attention_heads is 8, expected 4"],
    ),
    "a config.json that is no JSON": (
        lambda output: (output / "config.json").write_text("{"),
        ["config.json: cannot be read: Expecting property name"],
    ),
    "a manifest without a tensor": (
        forget_a_tensor, ["export_manifest.json: lacks lm_head.weight in rank0.safetensors"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_the_cheapest_level_names_the_file_and_what_is_wrong(name: str, checkpoint: Path, output: Path) -> None:
    spoil, expected = FAULTS[name]
    assert verify(checkpoint, output, "checksums").ok
    spoil(output)
    report = verify(checkpoint, output, "checksums")
    found = "\n".join(messages(report))
    assert not report.ok
    for text in expected:
        assert text in found
    assert len(report.faults) <= 3, found
    assert report.faults == verify(checkpoint, output).faults, "the other levels work on what is left"


def test_what_was_left_out_is_what_the_manifest_says(checkpoint: Path, output: Path) -> None:
    manifest = read_manifest(output)
    manifest["source"]["elements_left_out"] = {"padding rows of the vocabulary": 7}
    write_manifest(output, manifest)
    (fault,) = messages(verify(checkpoint, output, "coverage"))
    assert "export_manifest.json: records {'padding rows of the vocabulary': 7} elements left out, the rules" in fault


def test_a_stranger_is_named_and_listed_files_are_fine(checkpoint: Path, output: Path) -> None:
    (output / "README.md").write_text("mine")
    (output / "tokenizer.json").write_text("{}")
    manifest = read_manifest(output)
    manifest["files"]["tokenizer.json"] = {"num_bytes": 2}
    write_manifest(output, manifest)
    report = verify(checkpoint, output, "checksums")
    assert report.ok and report.warnings == ("README.md: is not part of this export",)
    (output / "tokenizer.json").write_text("{} ")
    assert messages(verify(checkpoint, output)) == ["checksums: tokenizer.json: has 3 bytes, expected 2"]
    (output / "tokenizer.json").unlink()
    assert messages(verify(checkpoint, output)) == ["checksums: tokenizer.json: is missing"]


def test_nan_and_infinities_are_named(checkpoint: Path, output: Path) -> None:
    def spoil(files) -> None:
        files["rank0.safetensors"]["lm_head.weight"][3, 5] = 0x7FC0
        files["rank0.safetensors"]["lm_head.weight"][4, 0] = 0xFF80
        files["rank1.safetensors"]["transformer.ln_f.weight"][1] = 0x7F80

    change(output, spoil)
    assert messages(verify(checkpoint, output, "checksums")) == [
        "checksums: rank0.safetensors: lm_head.weight: 2 elements are NaN or infinite, the first at [3, 5]",
        "checksums: rank1.safetensors: transformer.ln_f.weight: 1 element is NaN or infinite, the first at [1]",
    ]


def test_elements_are_counted_from_the_start_of_the_tensor(tmp_path: Path) -> None:
    """Not from that of the block in which they were read."""
    checkpoint = save(tmp_path / "checkpoint", small_model(LLAMA, padded_vocab_size=20_000))
    output = export_to(checkpoint, tmp_path / "out", TrtllmOptions())
    change(output, lambda files: files["rank0.safetensors"]["lm_head.weight"].__setitem__((19_000, 3), 0x7FC0))
    (fault,) = messages(verify(checkpoint, output, "checksums"))
    assert fault.endswith("lm_head.weight: 1 element is NaN or infinite, the first at [19000, 3]")


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_nan_in_other_element_types(dtype: str, checkpoint: Path, tmp_path: Path) -> None:
    output = export_to(checkpoint, tmp_path / "out", TrtllmOptions(dtype=dtype))
    assert verify(checkpoint, output).ok
    pattern = 0x7E00 if dtype == "float16" else 0x7FC00000
    change(output, lambda files: files["rank0.safetensors"]["lm_head.weight"].__setitem__((0, 1), pattern))
    (fault,) = messages(verify(checkpoint, output, "checksums"))
    assert fault.endswith("lm_head.weight: 1 element is NaN or infinite, the first at [0, 1]")


def test_tensors_of_zeros_are_named_unless_the_exporter_made_them(tmp_path: Path) -> None:
    model = small_model({**GPT, "add_bias_linear": False, "add_qkv_bias": True})
    for name, tensor in model.tensors.items():
        if name.endswith("linear_fc1.layer_norm_bias"):
            tensor.zero_()
    checkpoint = save(tmp_path / "checkpoint", model)
    output = export_to(checkpoint, tmp_path / "out", TrtllmOptions(tp_size=2))
    zeros = "transformer.layers.0.attention.dense.bias"
    from support.exports import tensors_of

    assert not tensors_of(output / "rank0.safetensors")[zeros].any()
    report = verify(checkpoint, output)
    assert report.ok
    (warning,) = report.warnings
    assert warning.startswith("4 tensors are all zero: rank0.safetensors: transformer.layers.0.post_layernorm.bias; ")
    assert "dense.bias" not in warning


def test_sha256_is_compared_where_the_manifest_has_it(checkpoint: Path, output: Path) -> None:
    report = verify(checkpoint, output, "checksums", sha256=True)
    data = {path.name: path.read_bytes() for path in sorted(output.glob("*.safetensors"))}
    assert report.ok and report.sha256 == {name: hashlib.sha256(bytes_).hexdigest() for name, bytes_ in data.items()}
    manifest = read_manifest(output)
    manifest["files"]["rank0.safetensors"]["sha256"] = report.sha256["rank0.safetensors"]
    manifest["files"]["rank1.safetensors"]["sha256"] = "0" * 64
    write_manifest(output, manifest)
    (fault,) = messages(verify(checkpoint, output, "checksums", sha256=True))
    assert fault.startswith("checksums: rank1.safetensors: was changed: its SHA-256 is ")


def test_an_index_that_sends_a_tensor_to_the_wrong_file(checkpoint: Path, tmp_path: Path) -> None:
    output = export_to(checkpoint, tmp_path / "out", HuggingFaceOptions(file_bytes=20_000))
    assert verify(checkpoint, output).ok
    path = output / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 1
    index["weight_map"]["lm_head.weight"] = files[0]
    path.write_text(json.dumps(index))
    (fault,) = messages(verify(checkpoint, output, "checksums"))
    assert f'weight_map.lm_head.weight is "{files[0]}", expected "' in fault


def test_the_checkpoint_of_another_training_is_noticed(checkpoint: Path, output: Path, tmp_path: Path) -> None:
    other = save(tmp_path / "checkpoint", small_model(LLAMA, seed=1))
    report = verify(other, output)
    assert {fault.level for fault in report.faults} == {"rebuild"}
    deeper = save(tmp_path / "deeper", small_model(LLAMA, num_layers=3))
    first = messages(verify(deeper, output))[0]
    assert first.startswith("plan: export_manifest.json: the export was made by another plan")


def test_a_later_iteration_does_not_replace_the_recorded_one(tmp_path: Path) -> None:
    save(tmp_path / "run" / "iter_0000010", small_model(LLAMA))
    tracker = tmp_path / "run" / "latest_checkpointed_iteration.txt"
    tracker.write_text("10")
    output = export_to(tmp_path / "run", tmp_path / "out")
    later = save(tmp_path / "run" / "iter_0000020", small_model(LLAMA, seed=1))
    state = torch.load(later / "common.pt", weights_only=False)
    torch.save({**state, "iteration": 20}, later / "common.pt")
    tracker.write_text("20")
    assert verify(tmp_path / "run", output).ok
    found = messages(verify(later, output, "checksums"))
    assert found == ["plan: export_manifest.json: was made from iteration 10, the checkpoint given is of iteration 20"]


def test_what_cannot_be_verified_is_refused(checkpoint: Path, output: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="no such verification level: everything; there are checksums, coverage"):
        VerifyOptions(levels=("everything",))
    with pytest.raises(ExportError, match="no such folder"):
        find_exports(tmp_path / "nowhere")
    with pytest.raises(ExportError, match=r"has no export_manifest.json; it is not an export, or an unfinished one"):
        find_exports(checkpoint)
    broken = {"{": "cannot be read: Expecting", "[]": "is no export manifest", "{}": "files is missing"}
    for text, message in broken.items():
        (output / "export_manifest.json").write_text(text)
        with pytest.raises(ExportError, match=message):
            verify(checkpoint, output)


@pytest.mark.parametrize(
    "request_, message",
    [
        ({"target": "onnx", "options": {}}, "request names no known target \\('onnx'\\); known: trtllm, hf"),
        ({"target": "hf", "options": {"color": 1}}, "the options of hf cannot be read: .*color"),
        ({"target": "trtllm", "options": {}}, "the options of trtllm cannot be read"),
    ],
)
def test_a_request_that_cannot_be_read(request_, message: str, checkpoint: Path, output: Path) -> None:
    manifest = read_manifest(output)
    manifest["request"] |= request_
    write_manifest(output, manifest)
    with pytest.raises(ExportError, match=message):
        verify(checkpoint, output)


def test_the_report_prints_and_dumps(checkpoint: Path, output: Path) -> None:
    report = verify(checkpoint, output, sha256=True)
    assert VerifyReport.from_json(report.to_json()) == report
    assert json.loads(report.to_json())["ok"] is True
    lines = str(report).splitlines()
    assert lines[0] == f"{output}: verified"
    assert "levels: checksums, coverage, rebuild" in lines[1]
    truncate(output)
    text = str(verify(checkpoint, output))
    assert text.startswith(f"{output}: the export is not right: 1 fault\n  - rank1.safetensors: has ")
