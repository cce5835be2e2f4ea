"""Engines through the command line. TensorRT-LLM and its ``build()`` are stand-ins (support/engine_stand_in.py)."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from support import engine_stand_in as stand_in
from support.exports import REPOSITORY, export, run_command
from support.small_models import LLAMA, small_model
from support.torch_dist import write_torch_dist


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = small_model(LLAMA)
    return write_torch_dist(tmp_path_factory.mktemp("source") / "iter_0000001", model.tensors, args=model.args)


@pytest.fixture(scope="module")
def exported(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(checkpoint, tmp_path_factory.mktemp("export") / "out", "--tp", 2)


@pytest.fixture
def here(tmp_path: Path) -> dict[str, str]:
    """TensorRT-LLM 0.14 and two Hopper GPUs."""
    return stand_in.install(tmp_path, "0.14") | stand_in.gpus(tmp_path, "9.0", "9.0")


def built(folder: Path) -> dict[int, dict]:
    """Target rank -> how its engine was built."""
    calls = [call for call in stand_in.calls_in(folder) if call["call"] == "build"]
    return {call["arguments"]["rank"]: call for call in calls}


def test_every_rank_is_built_from_its_own_file_on_a_gpu_of_its_own(
    exported: Path, tmp_path: Path, here: dict[str, str]
) -> None:
    launched = {"SLURM_PROCID": "0", "SLURM_JOB_ID": "7"}  # as inside an allocation, without srun
    process = run_command("engine", exported, tmp_path / "engines", "--max_batch_size", 16, env=here | launched)
    assert process.returncode == 0, process.stderr
    assert f"built engines in {tmp_path}/engines" in process.stdout
    names = sorted(path.name for path in (tmp_path / "engines").iterdir())
    assert names == ["config.json", "rank0.engine", "rank1.engine"]
    calls = built(tmp_path)
    assert sorted(calls) == [0, 1]
    assert {calls[0]["gpu"], calls[1]["gpu"]} == {"0", "1"}
    assert calls[0]["pid"] != calls[1]["pid"]
    assert all(call["launcher"] == [] for call in calls.values())
    assert calls[1]["arguments"]["config"]["max_batch_size"] == 16
    assert calls[1]["arguments"]["config"]["max_seq_len"] == 64  # the model's positions
    loads = [call["arguments"] for call in stand_in.calls_in(tmp_path) if call["call"] == "from_checkpoint"]
    assert sorted(each["config"] for each in loads) == ["config of rank 0", "config of rank 1"]
    assert {each["ckpt_dir"] for each in loads} == {str(exported)}


def test_an_export_goes_on_to_its_engines(checkpoint: Path, tmp_path: Path, here: dict[str, str]) -> None:
    options = tmp_path / "engine.yaml"
    options.write_text("max_batch_size: 8\nkv_cache_type: paged\nuse_paged_context_fmha: true\n")
    command = ["export", checkpoint, tmp_path / "out", "--tp", 2, "--build-engine", tmp_path / "engines"]
    process = run_command(*command, "--engine-config", options, "--engine-option", "gemm_plugin=auto", env=here)
    assert process.returncode == 0, process.stderr
    assert (tmp_path / "out" / "config.json").is_file()
    config, plugin = (built(tmp_path)[1]["arguments"][name] for name in ("config", "plugin"))
    assert (config["max_batch_size"], config["kv_cache_type"]) == (8, "KVCacheType.PAGED")
    assert (plugin["gemm_plugin"], plugin["use_paged_context_fmha"]) == ("auto", True)


def test_a_build_that_fails_publishes_nothing_and_says_why(
    checkpoint: Path, tmp_path: Path, here: dict[str, str]
) -> None:
    command = ["export", checkpoint, tmp_path / "out", "--tp", 2, "--build-engine", tmp_path / "engines"]
    process = run_command(*command, env=here | {"STAND_IN_FAILS": "1"})
    assert process.returncode == 2
    assert "the engine of target rank 1 on GPU 1: the build failed (exit code 3)" in process.stderr
    assert "[TRT] [E] out of workspace" in process.stderr
    assert f"build again with dist-export engine {tmp_path}/out {tmp_path}/engines" in process.stderr
    assert (tmp_path / "out" / "config.json").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["calls", "out", "programs", "site"]


def test_torchrun_ranks_build_each_their_own(exported: Path, tmp_path: Path, here: dict[str, str]) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "dist_export"]
    command += ["engine", str(exported), str(tmp_path / "engines")]
    process = subprocess.run(
        command, cwd=REPOSITORY, env={**os.environ, **here}, capture_output=True, text=True, timeout=120
    )
    assert process.returncode == 0, process.stderr
    calls = built(tmp_path)
    assert (calls[0]["gpu"], calls[1]["gpu"]) == ("0", "1")
    assert all(call["launcher"] == [] for call in calls.values())
    assert (tmp_path / "engines" / "rank1.engine").is_file()


@pytest.mark.parametrize(
    ("version", "capabilities", "options", "message"),
    [
        (None, ("9.0",), (), "TensorRT-LLM is not installed here; build in TensorRT-LLM's release image"),
        ("1.3.0rc5", ("9.0",), (), "TensorRT-LLM 1.3.0rc5 builds no engines any more; .*--target hf"),
        ("0.11.0", ("9.0",), (), "TensorRT-LLM 0.11.0 is not known to this program"),
        ("0.14.0", (), (), "no NVIDIA GPU is to be seen here"),
        ("0.14.0", ("7.5",), (), r"bfloat16 needs compute capability 8.0 \(Ampere or newer\), but NVIDIA Stand-in 0"),
        ("0.14.0", ("8.0",), ("--kv-cache", "fp8", "--kv-cache-scale", "1"), "FP8 needs compute capability 8.9"),
        ("0.14.0", ("10.0",), ("--kv-cache", "int8", "--kv-cache-scale", "1"), "computes no INT8 on .* 10.x, but"),
        ("0.14.0", ("9.0",), ("--trtllm-version", "0.16"), "0.14 is installed, but this export is for 0.16"),
        ("0.14.0", ("9.0",), ("--engine-option", "max_seq_len=65"), "max_seq_len 65 is more than the model's 64 pos"),
        ("0.14.0", ("9.0",), ("--engine-option", "max_beam=2"), "max_beam is unknown; known: max_batch_size"),
        ("0.14.0", ("9.0",), ("--target", "hf"), "add --target trtllm"),
    ],
)
def test_an_engine_that_cannot_be_built_stops_the_run_before_any_weight_is_read(
    checkpoint: Path, tmp_path: Path, version: str | None, capabilities: tuple[str, ...], options: tuple, message: str
) -> None:
    environment = stand_in.gpus(tmp_path, *capabilities)
    if version is not None:
        environment |= stand_in.install(tmp_path, "0.14", version=version)
    process = run_command(
        "export", checkpoint, tmp_path / "out", "--build-engine", tmp_path / "engines", *options, env=environment
    )
    assert process.returncode == 2
    assert re.search(message, process.stderr), process.stderr
    assert not (tmp_path / "out").exists()
    assert stand_in.calls_in(tmp_path) == []


def test_cuda_visible_devices_is_respected(exported: Path, tmp_path: Path) -> None:
    here = stand_in.install(tmp_path, "0.14") | stand_in.gpus(tmp_path, "9.0", "9.0", "9.0")
    process = run_command("engine", exported, tmp_path / "engines", env=here | {"CUDA_VISIBLE_DEVICES": "2,GPU-0001"})
    assert process.returncode == 0, process.stderr
    assert {call["gpu"] for call in built(tmp_path).values()} == {"2", "GPU-0001"}


def test_a_dry_run_builds_and_publishes_nothing(exported: Path, tmp_path: Path, here: dict[str, str]) -> None:
    process = run_command("engine", exported, tmp_path / "engines", "--dry_run", env=here)
    assert process.returncode == 0, process.stderr
    assert built(tmp_path)[0]["arguments"]["config"]["dry_run"] is True
    assert not (tmp_path / "engines").exists()


def test_engines_of_what_is_no_export_are_refused(tmp_path: Path) -> None:
    process = run_command("engine", tmp_path, tmp_path / "engines")
    assert process.returncode == 2
    assert "no TensorRT-LLM export" in process.stderr


def test_the_command_that_is_printed_fits_the_model(checkpoint: Path, tmp_path: Path) -> None:
    cache = ("--kv-cache", "int8", "--kv-cache-scale", 0.1)
    process = run_command("export", checkpoint, tmp_path / "out", "--tp", 2, *cache)
    assert process.returncode == 0, process.stderr
    command = process.stdout.rpartition("next: ")[2].split()
    assert command[:3] == ["trtllm-build", "--checkpoint_dir", f"{tmp_path}/out"]
    assert {"--max_seq_len 64", "--use_paged_context_fmha disable", "--workers 2"} <= {
        f"{a} {b}" for a, b in pairwise(command)
    }
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization"]["kv_cache_quant_algo"] == "INT8"
