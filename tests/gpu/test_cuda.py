"""What a GPU computes is what a CPU computes, byte for byte, within the memory it was given. Skipped without one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("no GPU here", allow_module_level=True)

from support.exports import REPOSITORY, export, run_command  # noqa: E402
from support.quantized import SCHEMES  # noqa: E402
from support.small_models import LLAMA, small_model  # noqa: E402
from support.torch_dist import write_torch_dist  # noqa: E402


def files(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(output.rglob("*.safetensors"))}


def assert_same_on_both(checkpoint: Path, folder: Path, *options: object) -> None:
    on_host = export(checkpoint, folder / "cpu", *options, "--device", "cpu")
    on_gpu = export(checkpoint, folder / "cuda", *options, "--device", "cuda")
    assert files(on_host) == files(on_gpu) != {}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("num_processes", [1, 2])
def test_casts(dtype: str, num_processes: int, long_checkpoint: Path, tmp_path: Path) -> None:
    options = ("--dtype", dtype, "--tp", 2, "--num-processes", num_processes, "--device-memory", "64m")
    assert_same_on_both(long_checkpoint, tmp_path, *options)


@pytest.mark.parametrize("target", ["trtllm", "hf"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_calibrated_schemes(scheme: str, target: str, quantized_checkpoints: dict[str, Path], tmp_path: Path) -> None:
    assert_same_on_both(quantized_checkpoints[scheme], tmp_path, "--target", target)


@pytest.mark.parametrize("scheme", ["fp8_per_channel", "int8_wo", "int4_wo"])
def test_schemes_of_plain_weights(scheme: str, long_checkpoint: Path, tmp_path: Path) -> None:
    assert_same_on_both(long_checkpoint, tmp_path, "--quantization", scheme)


def test_nan_and_infinity_are_the_same_bits(tmp_path: Path) -> None:
    model = small_model(LLAMA, dtype=torch.float32)
    name = next(name for name in model.tensors if "linear_fc1" in name)
    model.tensors[name].view(-1)[:4] = torch.tensor([float("nan"), -float("nan"), float("inf"), -float("inf")])
    folder = write_torch_dist(tmp_path / "iter_0000010", model.tensors, args=model.args)
    for dtype in ("bfloat16", "float16"):
        assert_same_on_both(folder, tmp_path / dtype, "--dtype", dtype)


NCCL = """
import numpy as np
from dist_export.runtime.collective import all_reduce_max
from dist_export.runtime.group import Group

values = np.array([1, -2, np.inf, -np.inf, np.nan, -0.0], np.float32)
found = all_reduce_max(values, Group.single(), step="x", device="cuda:0", backend="nccl")
assert found.tobytes() == (values + np.float32(0)).tobytes(), found
"""


def test_nccl_keeps_every_bit() -> None:
    done = subprocess.run([sys.executable, "-c", NCCL], cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_under_torchrun(quantized_checkpoints: dict[str, Path], tmp_path: Path) -> None:
    on_host = export(quantized_checkpoints["fp8"], tmp_path / "cpu", "--device", "cpu")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "1", "launch/export.py"]
    command += [str(quantized_checkpoints["fp8"]), str(tmp_path / "cuda"), "--device", "cuda"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert files(on_host) == files(tmp_path / "cuda")


def test_a_value_too_large_is_refused_as_on_a_cpu(tmp_path: Path) -> None:
    model = small_model(LLAMA, dtype=torch.float32)
    name = next(name for name in model.tensors if "linear_fc1" in name)
    model.tensors[name].view(-1)[3] = 1e6
    folder = write_torch_dist(tmp_path / "iter_0000010", model.tensors, args=model.args)
    messages = []
    for device in ("cpu", "cuda"):
        process = run_command("export", folder, tmp_path / device, "--dtype", "float16", "--device", device)
        assert process.returncode == 2 and not (tmp_path / device).exists()
        messages.append(process.stderr)
    assert messages[0] == messages[1] and "do not fit float16" in messages[0]


MEASURED = """
import sys, torch
from dist_export.cli import main
code = main(sys.argv[1:])
print("reserved", torch.cuda.max_memory_reserved())
sys.exit(code)
"""


@pytest.mark.parametrize("options", [("--dtype", "float16"), ("--quantization", "fp8_per_channel")])
def test_device_memory_is_bounded(options: tuple[str, str], long_checkpoint: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", MEASURED, "export", str(long_checkpoint), str(tmp_path / "out")]
    command += ["--num-processes", "1", "--device", "cuda", "--device-memory", "64m", *options]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert 0 < int(done.stdout.split("reserved")[1]) <= 64 << 20
