"""A delta holds the changed tensors alone; applied to the export it was made against it gives a fresh export."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from support.exports import raw_bytes, run_command, tensors_of  # noqa: E402
from support.refits import NEW, OLD, assert_same_export, contents, export, names, run, save_both  # noqa: E402
from support.small_models import LLAMA, small_model  # noqa: E402
from support.torch_dist import megatron_chunks  # noqa: E402

from dist_export.refit.apply import DeltaSession  # noqa: E402
from dist_export.refit.base import Base  # noqa: E402
from dist_export.refit.delta import Delta  # noqa: E402
from dist_export.refit.files import ComparedFiles  # noqa: E402
from dist_export.refit.redo import Commit  # noqa: E402
from dist_export.runtime.failure import Failure  # noqa: E402
from dist_export.runtime.group import Group  # noqa: E402
from dist_export.runtime.launch import run_local  # noqa: E402

OPTIONS = {
    "trtllm": ("--tp", 2),
    "hf": ("--target", "hf", "--max-file-size", "300k"),
    "both": ("--target", "hf", "--target", "trtllm", "--pp", 2, "--quantization", "fp8_per_channel"),
}


def edit(tensors: dict[str, torch.Tensor]) -> None:
    tensors["decoder.layers.mlp.linear_fc2.weight"][1] += 1
    tensors["embedding.word_embeddings.weight"][1500] *= -2


@pytest.fixture(scope="module")
def save(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = small_model(LLAMA, hidden_size=64, ffn_hidden_size=192, padded_vocab_size=2048)
    return save_both(tmp_path_factory.mktemp("delta") / "save", model, edit, chunks=megatron_chunks(tp=2))


@pytest.fixture(scope="module")
def made(save: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Path]]:
    """`made("hf")`: the old export, the new one, and the delta between them. Never changed."""
    known: dict[str, dict[str, Path]] = {}

    def make(kind: str) -> dict[str, Path]:
        if kind not in known:
            folder = tmp_path_factory.mktemp("made")
            old, new = (export(save, folder / str(number), number, *OPTIONS[kind]) for number in (OLD, NEW))
            before = contents(old)
            assert run("refit", save, old, "--iteration", NEW, "--delta-dir", folder / "delta") == 0
            assert contents(old) == before
            assert sorted(path.name for path in folder.iterdir()) == ["10", "20", "delta"]
            known[kind] = {"old": old, "new": new, "delta": folder / "delta"}
        return known[kind]

    return make


@pytest.mark.parametrize("kind", OPTIONS)
def test_applied_it_is_the_fresh_export(
    kind: str, made: Callable[[str], dict[str, Path]], save: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    folders = made(kind)
    output = Path(shutil.copytree(folders["old"], tmp_path / "elsewhere"))
    assert run("refit", folders["delta"], output) == 0
    assert_same_export(output, folders["new"])
    assert run("verify", save, output) == 0
    assert run("refit", folders["delta"], output) == 0
    assert "leads to already: nothing to do" in capsys.readouterr().out


def test_it_holds_the_changed_tensors_alone(made: Callable[[str], dict[str, Path]]) -> None:
    folders = made("trtllm")
    index = json.loads((folders["delta"] / "delta.json").read_text())["folders"][0]
    for rank in range(2):
        name = f"rank{rank}.safetensors"
        found, fresh = tensors_of(folders["delta"] / name), tensors_of(folders["new"] / name)
        old = tensors_of(folders["old"] / name)
        differing = {each for each in fresh if not torch.equal(fresh[each], old[each])}
        assert found.keys() == differing == index["files"][name]["tensors"].keys()
        assert all(torch.equal(found[each], fresh[each]) for each in found)
        vocabulary = {"transformer.vocab_embedding.weight"} if rank == 1 else set()  # the row lies in its half
        assert differing == {"transformer.layers.1.mlp.proj.weight"} | vocabulary
    assert index["base"]["iteration"] == OLD and index["new"]["iteration"] == NEW


def test_all_names(made: Callable[[str], dict[str, Path]], save: Path, tmp_path: Path) -> None:
    """Unchanged tensors come along, with their old bytes; the delta is applied like any other."""
    folders, delta = made("trtllm"), tmp_path / "delta"
    assert run("refit", save, folders["old"], "--iteration", NEW, "--delta-dir", delta, "--all-names") == 0
    for name in ("rank0.safetensors", "rank1.safetensors"):
        found, fresh = tensors_of(delta / name), tensors_of(folders["new"] / name)
        assert found.keys() == fresh.keys()
        assert all(raw_bytes(found[each]) == raw_bytes(fresh[each]) for each in fresh)
    output = Path(shutil.copytree(folders["old"], tmp_path / "out"))
    assert run("refit", delta, output) == 0
    assert_same_export(output, folders["new"])


def test_by_several_processes(made: Callable[[str], dict[str, Path]], save: Path, tmp_path: Path) -> None:
    """The delta is the same, and applied the same, whoever does it."""
    folders, delta = made("both"), tmp_path / "delta"
    arguments = ["refit", save, folders["old"], "--iteration", NEW, "--delta-dir", delta, "--num-processes", 3]
    process = run_command(*arguments)
    assert process.returncode == 0, process.stderr
    assert names(delta) == names(folders["delta"])
    for name in names(delta):
        if name.endswith(".safetensors"):
            assert (delta / name).read_bytes() == (folders["delta"] / name).read_bytes()
    output = Path(shutil.copytree(folders["old"], tmp_path / "out"))
    process = run_command("refit", delta, output, "--num-processes", 2)
    assert process.returncode == 0, process.stderr
    assert_same_export(output, folders["new"])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-10] ^= 1
    path.write_bytes(data)


def change_index(delta: Path, old: str, new: str) -> None:
    path = delta / "delta.json"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def change_offsets(path: Path, more: int) -> None:
    """Say that the last tensor has `more` bytes, which the file then has."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    last = max((entry for name, entry in header.items() if name != "__metadata__"), key=lambda e: e["data_offsets"][1])
    last["data_offsets"][1] += more
    path.write_bytes(data[:8] + json.dumps(header).encode().ljust(length) + data[8 + length :] + bytes(more))


def change_shape(path: Path) -> None:
    """Say that the first matrix has other dims, of as many bytes."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    entry = next(each for each in header.values() if len(each.get("shape", ())) == 2)
    entry["shape"] = [entry["shape"][0] * 2, entry["shape"][1] // 2]
    path.write_bytes(data[:8] + json.dumps(header, separators=(",", ":")).encode().ljust(length) + data[8 + length :])


def add_weights(delta: Path) -> None:
    """A file of weights among the documents, in the index as it should be."""
    (delta / "documents" / "stray.safetensors").write_bytes(b"weights")
    digest = hashlib.sha256(b"weights").hexdigest()
    change_index(delta, '"export_report.html"', f'"stray.safetensors": "{digest}", "export_report.html"')


def change_document(delta: Path, name: str, old: str, new: str) -> None:
    """Change a document, and what the index says of it."""
    path = delta / "documents" / name
    before = hashlib.sha256(path.read_bytes()).hexdigest()
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    change_index(delta, before, hashlib.sha256(path.read_bytes()).hexdigest())


def rename_tensor(output: Path) -> None:
    path = output / "rank1.safetensors"
    path.write_bytes(path.read_bytes().replace(b"transformer.ln_f.weight", b"transformer.ln_g.weight"))


FAULTS: dict[str, tuple[Callable[[Path, Path], object], str]] = {
    "a flipped bit in the delta": (
        lambda delta, output: flip(delta / "rank1.safetensors"), "in the delta has checksum .*; the file is damaged",
    ),
    "a flipped bit in the base": (
        lambda delta, output: flip(output / "rank1.safetensors"),
        "in the export, which the delta does not change, has checksum",
    ),
    "a missing file": (
        lambda delta, output: (delta / "rank1.safetensors").unlink(), "rank1.safetensors: is missing",
    ),
    "a missing tensor": (lambda delta, output: rename_tensor(output), "holds other tensors than the new"),
    "another manifest": (
        lambda delta, output: flip(delta / "documents" / "export_manifest.json"), "export_manifest.json: ",
    ),
    "another configuration": (
        lambda delta, output: (delta / "documents" / "config.json").write_text("{}"),
        "config.json: is not the document that the delta was made with",
    ),
    "a configuration of another model": (
        lambda delta, output: change_document(delta, "config.json", '"num_hidden_layers": 2', '"num_hidden_layers": 3'),
        "num_hidden_layers is 2, of the delta 3",
    ),
    "a name that leads out": (
        lambda delta, output: change_index(delta, '"export_report.html"', '"../../secret"'), "is no name of a file",
    ),
    "another format": (
        lambda delta, output: change_index(delta, '"format_version": 1', '"format_version": 7'), "format 7, this",
    ),
    "another folder": (lambda delta, output: change_index(delta, '"folder": "."', '"folder": "hf"'), "is for the fold"),
    "no content": (lambda delta, output: change_index(delta, '"content"', '"contents"'), "does not say what it was ma"),
    "an offset that is too large": (
        lambda delta, output: change_offsets(delta / "rank0.safetensors", 2), "has [0-9]+ bytes, bfloat16 .* needs",
    ),
    "another shape": (
        lambda delta, output: change_shape(delta / "rank0.safetensors"), r"is bfloat16 \[.*\], expected bfloat16 \[",
    ),
    "weights among the documents": (
        lambda delta, output: add_weights(delta), "stray.safetensors: is not the document that the delta was made with",
    ),
    "no JSON": (lambda delta, output: change_index(delta, "{", "["), "is no index of a delta"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_what_does_not_fit_is_refused(
    fault: str, made: Callable[[str], dict[str, Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = made("trtllm")
    delta = Path(shutil.copytree(folders["delta"], tmp_path / "delta"))
    output = Path(shutil.copytree(folders["old"], tmp_path / "out"))
    make, message = FAULTS[fault]
    make(delta, output)
    before = contents(output)
    capsys.readouterr()
    assert run("refit", delta, output) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert contents(output) == before and sorted(path.name for path in tmp_path.iterdir()) == ["delta", "out"]


def test_the_base_must_be_the_one_it_was_made_against(
    made: Callable[[str], dict[str, Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = made("trtllm")
    output = Path(shutil.copytree(folders["old"], tmp_path / "out"))
    other = output / "export_manifest.json"
    manifest = json.loads(other.read_text())
    manifest["files"]["rank0.safetensors"]["tensors"]["lm_head.weight"]["crc32"] = "00000000"
    manifest["source"]["iteration"] = 5
    other.write_text(json.dumps(manifest))
    before = contents(output)
    assert run("refit", folders["delta"], output) == 2
    error = capsys.readouterr().err
    assert "is not for this export" in error and "holds iteration 5" in error
    assert "was made against iteration 10" in error and contents(output) == before


def failure_of(main: Callable[[Group], object]) -> str:
    """Why a process fails."""
    messages: list[str] = []

    def run_main(group: Group) -> int:
        main(group)
        return 0

    def tell(failure: Failure, *, with_rank: bool = True) -> None:
        messages.append(failure.message)

    assert run_local(1, run_main, tell=tell) == 2, messages
    return messages[0]


def test_an_export_that_is_replaced_meanwhile(made: Callable[[str], dict[str, Path]], tmp_path: Path) -> None:
    """By a run that ended before this one had the lease, or that took the lease from it."""

    class Overtaken(DeltaSession):
        def _commit(self, prepared: Path, files: ComparedFiles) -> Commit:
            record = super()._commit(prepared, files)
            with (self.base.output / "export_manifest.json").open("a") as file:
                file.write("\n")
            return record

    folders, output = made("trtllm"), tmp_path / "out"
    shutil.copytree(folders["old"], output)
    delta, base = Delta.read(folders["delta"]), Base.read(output)
    message = f"{output}: was replaced by another run meanwhile"
    weights = (output / "rank0.safetensors").read_bytes()
    assert message in failure_of(lambda group: Overtaken(delta, base, group).run())
    assert (output / "rank0.safetensors").read_bytes() == weights
    assert message in failure_of(lambda group: DeltaSession(delta, base, group).run())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_rank_that_finds_a_file_missing_first(made: Callable[[str], dict[str, Path]], tmp_path: Path) -> None:
    folders, output = made("trtllm"), Path(shutil.copytree(made("trtllm")["old"], tmp_path / "out"))
    (output / "rank1.safetensors").unlink()
    delta, base = Delta.read(folders["delta"]), Base.read(output)
    said = failure_of(lambda group: DeltaSession(delta, base, group)._tensors())
    assert said == f"{output / 'rank1.safetensors'}: No such file or directory"


def test_options_of_checkpoints_are_not_for_deltas(
    made: Callable[[str], dict[str, Path]], save: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = made("trtllm")
    assert run("refit", folders["delta"], folders["old"], "--iteration", 3, "--delta-dir", tmp_path / "d") == 2
    assert "--iteration, --delta-dir: is for a checkpoint, which" in capsys.readouterr().err
    assert run("refit", save, folders["old"], "--delta-dir", folders["new"]) == 2
    assert "an export is there already" in capsys.readouterr().err
