"""The commands as people type them: help, inspect, plan, export, sizes, exit codes, start-up."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from support.exports import REPOSITORY, config_of, export, run_command, tensors_of  # noqa: E402
from support.small_models import GPT, LLAMA, small_model  # noqa: E402
from support.torch_dist import megatron_chunks, write_torch_dist  # noqa: E402

from dist_export.arguments import parse_size, positive  # noqa: E402

MODEL = small_model(LLAMA)


@pytest.fixture(scope="module")
def save(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A --save folder with two iterations; the latest is 20."""
    folder = tmp_path_factory.mktemp("save")
    for number, seed in ((10, 1), (20, 0)):
        tensors = small_model(LLAMA, seed=seed).tensors
        write_torch_dist(folder / f"iter_{number:07d}", tensors, args=MODEL.args, chunks=megatron_chunks(tp=2))
    (folder / "latest_checkpointed_iteration.txt").write_text("20")
    return folder


def test_help_fits_on_a_screen() -> None:
    for arguments in ((), ("inspect",), ("plan",), ("export",)):
        process = run_command(*arguments, "--help")
        assert process.returncode == 0
        assert len(process.stdout.splitlines()) <= 60
        assert max(map(len, process.stdout.splitlines())) <= 100
    assert run_command("--version").stdout.startswith("dist-export ")


@pytest.mark.parametrize(
    "arguments",
    [(), ("convert",), ("export", "only-one"), ("export", "a", "b", "--tp", "0"), ("plan", "a", "--dtype", "int8"),
     ("export", "a", "b", "--host-memory", "lots"), ("plan", "a", "--iteration", "last")],
)  # fmt: skip
def test_wrong_usage_is_bad_input(arguments: tuple[str, ...]) -> None:
    process = run_command(*arguments)
    assert process.returncode == 2
    assert process.stderr.startswith("usage: dist-export")
    assert "Traceback" not in process.stderr


def test_inspect_says_what_is_in_a_checkpoint(save: Path) -> None:
    text = run_command("inspect", save).stdout
    for part in ("torch_dist", "iter_0000020", "num_query_groups", "linear_qkv.weight", "64x32", "bfloat16"):
        assert part in text
    facts = json.loads(run_command("inspect", save, "--json").stdout)
    assert facts["folder"].endswith("iter_0000020")
    assert facts["tensors"]["output_layer.weight"] == {"shape": [64, 32], "dtype": "bfloat16"}
    assert facts["config"]["num_query_groups"]["value"] == 2
    assert "num_query_groups" in facts["config"]["num_query_groups"]["from"]
    assert json.loads(run_command("inspect", save, "--iteration", 10, "--json").stdout)["folder"].endswith("0000010")


def test_plan_is_what_export_does(save: Path, tmp_path: Path) -> None:
    options = ("--tp", 2, "--pp", 2, "--vocab-size", 61, "--trtllm-version", "1.0")
    summary = json.loads(run_command("plan", save, *options, "--json").stdout)
    output = export(save, tmp_path / "out", *options)
    text = json.dumps(summary)
    written = {path.name: path.stat().st_size for path in output.glob("*.safetensors")}
    assert all(name in text and str(size) in text for name, size in written.items())
    names = {name for path in output.glob("*.safetensors") for name in tensors_of(path)}
    assert all(f'"{name}"' in text for name in names)
    people = run_command("plan", save, *options).stdout
    assert "rank3.safetensors" in people and "padding rows of the vocabulary" in people
    assert not any(path.name.startswith(".") for path in tmp_path.iterdir())


def test_an_iteration_a_file_and_single_fields(save: Path, tmp_path: Path) -> None:
    file = tmp_path / "model.yaml"
    file.write_text("norm_epsilon: 1.0e-6\nrotary_base: 500000\n")
    options = ("--iteration", 10, "--config", file, "--set", "rotary_base=1000000", "--set", "rope_scaling=linear:2")
    output = export(save, tmp_path / "out", *options)
    config = config_of(output)
    assert (config["norm_epsilon"], config["rotary_base"]) == (1e-6, 1000000.0)
    assert config["rotary_scaling"] == {"type": "linear", "factor": 2.0}
    expected = small_model(LLAMA, seed=1).tensors["decoder.final_layernorm.weight"]
    assert torch.equal(tensors_of(output / "rank0.safetensors")["transformer.ln_f.weight"], expected)
    model = json.loads((output / "export_manifest.json").read_text())["model"]
    assert "command line" in model["rotary_base"]["from"]
    assert "model.yaml" in model["norm_epsilon"]["from"]


def test_the_closing_table(save: Path, tmp_path: Path) -> None:
    process = run_command("export", save, tmp_path / "out", "--tp", 2, "--num-processes", 2)
    assert process.stderr == ""  # no progress line where standard error is no terminal
    assert re.search(r"exported llama .*to .*out", process.stdout)
    for column in ("needed", "read", "from disk", "written", "memory", "seconds"):
        assert column in process.stdout
    assert f"next: trtllm-build --checkpoint_dir {tmp_path}/out" in process.stdout
    assert "note: vocab_size: the padded size 64 is kept" in process.stdout


def test_no_torch_is_imported(save: Path, tmp_path: Path) -> None:
    program = (
        "import sys; sys.argv = sys.argv[1:]; from dist_export.cli import main\n"
        "code = main(); print(*({'torch', 'numpy'} & set(sys.modules)), file=sys.stderr); sys.exit(code)"
    )
    export = ("export", save, tmp_path / "out", "--num-processes", 1)
    for arguments, imported in ((("inspect", save), "numpy"), (("plan", save), "numpy"), (export, "numpy")):
        command = [sys.executable, "-c", program, "dist-export", *map(str, arguments)]
        process = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
        assert (process.returncode, process.stderr) == (0, f"{imported}\n")


def test_help_needs_neither_torch_nor_numpy() -> None:
    program = (
        "import atexit, sys; from dist_export.cli import main\n"
        "atexit.register(lambda: print(*({'torch', 'numpy'} & set(sys.modules)), file=sys.stderr)); main(['--help'])"
    )
    command = [sys.executable, "-c", program]
    process = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert (process.returncode, process.stderr) == (0, "\n") and "usage: " in process.stdout


def test_a_cast_of_a_small_model_needs_no_torch_either(tmp_path: Path) -> None:
    model = small_model(GPT, dtype=torch.float32)
    checkpoint = write_torch_dist(tmp_path / "c", model.tensors, args=model.args)
    output = export(checkpoint, tmp_path / "out", "--dtype", "float16")
    written = tensors_of(output / "rank0.safetensors")["transformer.layers.0.mlp.fc.weight"]
    assert torch.equal(written, model.layer(0, "mlp.linear_fc1.weight").half())


@pytest.mark.parametrize(
    ("text", "size"), [("4096", 4096), ("512m", 512 << 20), ("1g", 1 << 30), ("1.5GiB", 3 << 29), ("2KB", 2048)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "g", "1x", "big", "-", "1 2m", "-1", "-5m", "0", "nan", "inf", "infg"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="is not a size such as 512m or 2g"):
        parse_size(text)


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "²", "", "two"])
def test_no_positive_numbers(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="is not a whole number of at least 1"):
        positive(text)


def test_a_closed_pipe_is_no_error(save: Path) -> None:
    command = f"{sys.executable} -m dist_export inspect {save} --json | head -c 10"
    process = subprocess.run(["bash", "-o", "pipefail", "-c", command], cwd=REPOSITORY, capture_output=True, text=True)
    assert process.stderr == ""
