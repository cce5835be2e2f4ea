"""Exports on a GPU are those of a CPU, byte for byte, within the memory they were given. Skipped without one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("no GPU here", allow_module_level=True)

from support.adapters import lora, write_bridge_adapters  # noqa: E402
from support.exports import REPOSITORY, export, raw_bytes, run_command  # noqa: E402
from support.live_configuration import CONFIGURATION, MODEL_FIELDS  # noqa: E402
from support.quantized import SCHEMES  # noqa: E402
from support.small_models import LLAMA, small_model  # noqa: E402
from support.torch_dist import write_torch_dist  # noqa: E402

from dist_export.live import iterate  # noqa: E402
from dist_export.quantization import QuantizationOptions  # noqa: E402
from dist_export.targets.huggingface.target import HuggingFaceOptions  # noqa: E402
from dist_export.targets.trtllm.target import TrtllmOptions  # noqa: E402

pytestmark = pytest.mark.gpu
PATH = f"{REPOSITORY}:{os.environ.get('PYTHONPATH', '')}"
ENVIRONMENT = {**os.environ, "PYTHONPATH": PATH, "NCCL_SOCKET_IFNAME": "lo"}


def files(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(output.rglob("*.safetensors"))}


def assert_same_on_both(checkpoint: Path, folder: Path, *options: object) -> None:
    on_host = export(checkpoint, folder / "cpu", *options, "--device", "cpu")
    on_gpu = export(checkpoint, folder / "cuda", *options, "--device", "cuda")
    assert files(on_host) == files(on_gpu) != {}


def run_python(*arguments: object) -> str:
    """What a program printed, which must succeed."""
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=REPOSITORY, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


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
        (tmp_path / dtype).mkdir()
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
    run_python("-c", NCCL)


def test_under_torchrun(quantized_checkpoints: dict[str, Path], tmp_path: Path) -> None:
    on_host = export(quantized_checkpoints["fp8"], tmp_path / "cpu", "--device", "cpu")
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", 1)
    run_python(*torchrun, "launch/export.py", quantized_checkpoints["fp8"], tmp_path / "cuda", "--device", "cuda")
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
    within = ("--num-processes", 1, "--device", "cuda", "--device-memory", "64m")
    printed = run_python("-c", MEASURED, "export", long_checkpoint, tmp_path / "out", *within, *options)
    assert 0 < int(printed.split("reserved")[1]) <= 64 << 20


def test_merged_adapters_that_are_cast(tmp_path: Path) -> None:
    model = small_model(LLAMA, dtype=torch.float32)
    base = write_torch_dist(tmp_path / "base" / "iter_0000010", model.tensors, args=model.args)
    adapters = write_bridge_adapters(tmp_path / "lora", lora(model.tensors))
    assert_same_on_both(adapters, tmp_path, "--base", base, "--dtype", "bfloat16")


@pytest.mark.parametrize("target", [TrtllmOptions(), HuggingFaceOptions()], ids=["trtllm", "hf"])
@pytest.mark.parametrize("algorithm", ["auto", "fp8_per_channel"])
def test_a_live_model_on_a_gpu(algorithm: str, target: TrtllmOptions | HuggingFaceOptions) -> None:
    """Its tensors are those of the same model on the CPU, and there; what is still being written is waited for."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    for device in ("cpu", "cuda:0"):
        state: dict[str, Any] = {}
        if device != "cpu":
            torch.cuda._sleep(500_000_000)
        for name, tensor in small_model(LLAMA).per_layer().items():
            state[name] = tensor.to(device, non_blocking=True)
        options = {"transformer_config": CONFIGURATION, "model_fields": MODEL_FIELDS, "bucket_bytes": 1 << 12}
        found[device] = dict(iterate(state, target, quantization=QuantizationOptions(algorithm=algorithm), **options))
    assert {tensor.device.type for tensor in found["cuda:0"].values()} == {"cuda"}
    assert list(found["cpu"]) == list(found["cuda:0"])
    assert [n for n, each in found["cpu"].items() if raw_bytes(each) != raw_bytes(found["cuda:0"][n].cpu())] == []


@pytest.mark.parametrize(
    ("program", "printed"),
    [
        ("gpu_kernels.py --megabytes 64 --runs 3", "overlapped / one by one"),
        ("gpu_export.py --megabytes 64 --runs 1", "without / with overlap"),
        ("against_distributed_converter.py --layers 2 --hidden 256 --runs 1", "Megatron-Core"),
    ],
    ids=lambda text: text.split(".py")[0],
)
def test_benchmarks_run(program: str, printed: str) -> None:
    if program.startswith("against"):
        pytest.importorskip("megatron.core")
    name, *options = program.split()
    assert printed in run_python(f"tests/benchmarks/{name}", *options)
