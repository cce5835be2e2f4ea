"""A refit gives the very folder that a fresh export gives, and writes only what has changed."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from support.exports import REPOSITORY  # noqa: E402
from support.quantized import reshard  # noqa: E402
from support.refits import NEW, OLD, assert_same_export, contents, export, names, run, save_both  # noqa: E402
from support.small_models import GPT, LLAMA, small_model  # noqa: E402
from support.torch_dist import change_args, megatron_chunks  # noqa: E402

from dist_export.errors import ExportError  # noqa: E402
from dist_export.refit.base import Base  # noqa: E402
from dist_export.refit.blocks import BLOCK_BYTES  # noqa: E402
from dist_export.refit.engines import engine_lines  # noqa: E402

Save = Callable[[], Path]


def edit(tensors: dict[str, torch.Tensor]) -> None:
    """A matrix of one layer, two rows of the vocabulary, a norm; everything else stays."""
    tensors["decoder.layers.mlp.linear_fc2.weight"][1] += 1
    tensors["embedding.word_embeddings.weight"][[0, 1000]] *= -2
    tensors["decoder.final_layernorm.weight"] += 0.5


@pytest.fixture(scope="module")
def save(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Iterations 10 and 20 of a model of 1.3 MB, saved by a run of tp 2."""
    model = small_model(LLAMA, hidden_size=64, ffn_hidden_size=192, padded_vocab_size=2048)
    return save_both(tmp_path_factory.mktemp("refit") / "save", model, edit, chunks=megatron_chunks(tp=2))


TARGETS = {
    "trtllm tp2": ("--tp", 2),
    "trtllm tp2 pp2": ("--tp", 2, "--pp", 2, "--vocab-size", 2001, "--dtype", "float16"),
    "hf": ("--target", "hf", "--max-file-size", "300k", "--sha256"),
    "both": ("--target", "trtllm", "--target", "hf", "--tp", 2),
    "fp8 rows": ("--tp", 2, "--quantization", "fp8_per_channel"),
    "fp8 rows hf": ("--target", "hf", "--quantization", "fp8_per_channel"),
}


@pytest.mark.parametrize("options", [pytest.param(each, id=name) for name, each in TARGETS.items()])
def test_the_same_as_a_fresh_export(options: tuple[object, ...], save: Path, tmp_path: Path) -> None:
    output = export(save, tmp_path / "out", OLD, *options)
    fresh = export(save, tmp_path / "fresh", NEW, *options)
    assert run("refit", save, output, "--iteration", NEW) == 0
    assert_same_export(output, fresh)
    assert run("verify", save, output) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fresh", "out"]
    for manifest in output.rglob("export_manifest.json"):
        told = json.loads(manifest.read_text())
        assert told["refit"]["from_iteration"] == OLD and told["source"]["iteration"] == NEW
    assert run("refit", save, output, "--iteration", OLD) == 0
    assert_same_export(output, export(save, tmp_path / "old", OLD, *options))


def test_only_changed_blocks_are_written(save: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = export(save, tmp_path / "out", OLD, "--target", "hf", "--max-file-size", "300k")
    before = {path: (path.stat().st_ino, path.read_bytes()) for path in sorted(output.glob("*.safetensors"))}
    times = {path: path.stat().st_mtime_ns for path in before}
    capsys.readouterr()
    assert run("refit", save, output) == 0
    text = capsys.readouterr().out
    written = 0
    for path, (inode, old) in before.items():
        new = path.read_bytes()
        assert path.stat().st_ino == inode and len(old) == len(new)
        if old == new:
            assert path.stat().st_mtime_ns == times[path], path
        written += sum(a != b for a, b in zip(old, new, strict=True))
    manifest = json.loads((output / "export_manifest.json").read_text())
    num_tensors = sum(len(each["tensors"]) for each in manifest["files"].values())
    assert manifest["refit"] == {"from_iteration": OLD, "num_tensors_changed": 3}
    assert f"3 of {num_tensors} tensors changed" in text and "(4 blocks of up to 64 KiB)" in text
    assert 0 < written < 4 * BLOCK_BYTES
    # Nothing differs any more.
    assert run("refit", save, output) == 0
    assert f"0 of {num_tensors} tensors changed; 0 B of" in capsys.readouterr().out


def test_many_exports_in_one_folder(save: Path, tmp_path: Path) -> None:
    """No job made them together, so no order of theirs is looked for."""
    one, many = export(save, tmp_path / "one", OLD), tmp_path / "many"
    for number in range(12):
        folder = many / f"{number:02d}"
        folder.mkdir(parents=True)
        for name in ("config.json", "export_manifest.json"):
            shutil.copy(one / name, folder)
    assert [each.folder for each in Base.read(many).folders] == [f"{number:02d}" for number in range(12)]
    manifest = many / "07" / "export_manifest.json"
    manifest.write_text(manifest.read_text().replace('"family": null', '"family": "llama"'))
    with pytest.raises(ExportError, match="its targets were exported differently"):
        Base.read(many)


def test_sha256_counts_as_progress(save: Path, tmp_path: Path) -> None:
    """Ranks that wait for the one that reads a large file must see that it goes on."""
    num_bytes = []
    for name, options in (("plain", ()), ("hashed", ("--sha256",))):
        output = export(save, tmp_path / name, OLD, *options)
        assert run("refit", save, output, "--progress-file", tmp_path / "progress.json") == 0
        num_bytes.append(json.loads((tmp_path / "progress.json").read_text())["bytes_read"])
    size = sum(path.stat().st_size for path in output.glob("*.safetensors"))
    assert num_bytes[1] - num_bytes[0] == size > 1 << 19


def test_a_damaged_old_file_comes_out_right(save: Path, tmp_path: Path) -> None:
    """What is compared is the file, not its manifest."""
    output = export(save, tmp_path / "out", OLD, "--tp", 2)
    path = output / "rank1.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert run("refit", save, output) == 0
    assert_same_export(output, _latest(save, tmp_path))


def _latest(save: Path, folder: Path, *options: object) -> Path:
    """A fresh export of the latest iteration, without --iteration."""
    assert run("export", save, folder / "fresh", *(options or ("--tp", 2))) == 0
    return folder / "fresh"


def test_one_target_of_several(save: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A target's folder is an export by itself."""
    options = TARGETS["both"]
    output, fresh = export(save, tmp_path / "out", OLD, *options), export(save, tmp_path / "fresh", NEW, *options)
    old = contents(output / "trtllm")
    assert run("refit", save, output / "hf") == 0
    assert contents(output / "trtllm") == old
    for name in names(fresh / "hf"):
        if name.endswith((".safetensors", "config.json")):
            assert (output / "hf" / name).read_bytes() == (fresh / "hf" / name).read_bytes()
    assert run("refit", save, output, "--iteration", NEW) == 0  # of which one is there already
    assert_same_export(output, fresh)
    assert run("verify", save, output) == 0
    manifest = output / "hf" / "export_manifest.json"
    manifest.write_text(manifest.read_text().replace('"family": null', '"family": "llama"'))
    assert run("refit", save, output) == 2
    assert "its targets were exported differently; refit each of their folders by itself" in capsys.readouterr().err


def test_calibrated_fp8_with_new_scales(quantized_checkpoints: dict[str, Path], tmp_path: Path) -> None:
    old = quantized_checkpoints["fp8"]

    def trained(tensors: dict[str, torch.Tensor]) -> None:
        for name in sorted(tensors):
            if name.endswith("_amax"):
                tensors[name].mul_(1.25)
        next(t for name, t in tensors.items() if name.endswith("mlp.linear_fc2.weight")).mul_(0.5)

    new = reshard(old, tmp_path / "new", tp=2, edit=trained)
    for number, options in enumerate([("--tp", 2), ("--target", "hf")]):
        output, fresh = tmp_path / f"out{number}", tmp_path / f"fresh{number}"
        assert run("export", old, output, *options) == 0 and run("export", new, fresh, *options) == 0
        assert run("refit", new, output) == 0
        assert_same_export(output, fresh)
        assert run("verify", new, output) == 0
        assert run("verify", old, output, "--levels", "rebuild") == 4


@pytest.mark.parametrize("launch", ["own processes", "torchrun"])
def test_several_processes(launch: str, save: Path, tmp_path: Path) -> None:
    output = export(save, tmp_path / "out", OLD, "--tp", 2)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = torchrun if launch == "torchrun" else [sys.executable]
    arguments = ["refit", str(save), str(output)] + ([] if launch == "torchrun" else ["--num-processes", "3"])
    process = subprocess.run(
        [*command, "-m", "dist_export", *arguments],
        cwd=REPOSITORY, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert process.returncode == 0, process.stdout + process.stderr
    assert process.stdout.count("iteration 10 to 20") == 1
    assert_same_export(output, _latest(save, tmp_path))


REFUSED = {
    "shape": ({"ffn_hidden_size": 96}, {}, "mlp.fc.weight is bfloat16|mlp.*absent|is (bfloat16|float32) "),
    "rotary base": ({}, {"rotary_base": 500000}, "rotary_base is 10000.*of the checkpoint 500000"),
    "layers": ({"num_layers": 4}, {}, "num_hidden_layers is 2, of the checkpoint 4"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_another_model_is_refused(name: str, save: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes, args, message = REFUSED[name]
    model = small_model(LLAMA, **{"hidden_size": 64, "ffn_hidden_size": 192, "padded_vocab_size": 2048, **sizes})
    other = save_both(tmp_path / "other", model, lambda tensors: None)
    if args:
        change_args(other / f"iter_{NEW:07d}", **args)
    output = export(save, tmp_path / "out", OLD, "--tp", 2)
    before = contents(output)
    capsys.readouterr()
    assert run("refit", other, output) == 2
    error = capsys.readouterr().err
    assert error.count("cannot take the place of the exported one") == 1
    assert re.search(message, error), error
    assert "export the checkpoint anew with dist-export export --overwrite" in error
    assert contents(output) == before and not list(tmp_path.glob(".*"))


def test_another_family_is_refused(save: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = save_both(tmp_path / "other", small_model(GPT), lambda tensors: None)
    output = export(save, tmp_path / "out", OLD)
    assert run("refit", other, output) == 2
    assert 'architecture is "LlamaForCausalLM", of the checkpoint "GPTForCausalLM"' in capsys.readouterr().err


def test_bad_outputs_are_refused(save: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*arguments: object) -> str:
        assert run("refit", *arguments) == 2
        return capsys.readouterr().err

    output = export(save, tmp_path / "out", OLD)
    assert "no such folder" in refused(save, tmp_path / "nowhere")
    assert "has no export_manifest.json" in refused(save, save)
    assert "--all-names: is for --delta-dir" in refused(save, output, "--all-names")
    assert "--calibration x: the export was made without" in refused(save, output, "--calibration", "x")
    assert "--engines" in refused(save, output, "--engines", tmp_path)
    os.link(output / "rank0.safetensors", tmp_path / "link")
    assert "has 2 hard links" in refused(save, output)
    (tmp_path / "link").unlink()
    os.rename(output / "rank0.safetensors", tmp_path / "elsewhere")
    (output / "rank0.safetensors").symlink_to(tmp_path / "elsewhere")
    assert "is a symbolic link" in refused(save, output)
    os.replace(tmp_path / "elsewhere", output / "rank0.safetensors")
    manifest = (output / "export_manifest.json").read_text()
    (output / "export_manifest.json").write_text(manifest.replace('"crc32"', '"crc"'))
    assert "does not list the tensors as it should" in refused(save, output)
    (output / "export_manifest.json").write_text(manifest)
    (output / "config.json").unlink()
    assert "has no config.json; it is an unfinished export" in refused(save, output)


def test_an_export_that_can_be_resumed_is_left_alone(
    save: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = export(save, tmp_path / "out", OLD)
    staging = tmp_path / ".out.dist_export"
    (staging / "journal").mkdir(parents=True)
    (staging / "job.json").write_text("{}")
    before = contents(tmp_path)
    assert run("refit", save, output) == 2
    assert "was stopped and can be resumed" in capsys.readouterr().err
    assert contents(tmp_path) == before
    shutil.rmtree(staging)
    assert run("refit", save, output) == 0


def test_engines(save: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command, or why it will not do."""
    output = export(save, tmp_path / "out", OLD, "--tp", 2)
    config = json.loads((output / "config.json").read_text())
    engines = tmp_path / "engines"
    engines.mkdir()

    def said(**build: object) -> str:
        built = {"pretrained_config": config, "build_config": build}
        (engines / "config.json").write_text(json.dumps(built))
        capsys.readouterr()
        assert run("refit", save, output, "--engines", engines) == 0
        return capsys.readouterr().out

    command = f"trtllm-refit --engine_dir {engines} --checkpoint_dir {output} --output_dir {engines}-refitted"
    assert command in said(use_refit=True)
    assert command in said(use_strip_plan=True)
    assert "were built without `--refit`" in said()
    assert "were built with fast_build" in said(use_refit=True, plugin_config={"manage_weights": True})
    fp8 = {"low_latency_gemm_plugin": "fp8"}
    assert command in said(use_refit=True, plugin_config=fp8)  # no scale has changed
    lines = engine_lines(config, output, engines, scales_changed=True)
    assert len(lines) == 1 and "low_latency_gemm_plugin fp8: scales have changed" in lines[0]
    config["dtype"] = "float16"
    assert "are of another model (dtype is float16, of the export bfloat16)" in said(use_refit=True)


def test_no_file_is_left_out_of_the_comparison(save: Path, tmp_path: Path) -> None:
    """Copied files come and go with what the new plan copies."""
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "tokenizer.json").write_text("{}")
    (tokenizer / "tokenizer_config.json").write_text("{}")
    output = export(save, tmp_path / "out", OLD, "--target", "hf", "--tokenizer", tokenizer)
    other, delta = Path(shutil.copytree(output, tmp_path / "other")), tmp_path / "delta"
    (tokenizer / "tokenizer_config.json").unlink()
    (tokenizer / "tokenizer.json").write_text('{"a": 1}')
    assert run("refit", save, output, "--delta-dir", delta) == 0
    assert run("refit", save, output) == 0
    assert_same_export(output, _latest(save, tmp_path, "--target", "hf", "--tokenizer", tokenizer))
    assert "tokenizer_config.json" not in names(output)
    assert run("refit", delta, other) == 0
    assert_same_export(other, output)
