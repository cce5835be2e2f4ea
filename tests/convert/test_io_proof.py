"""Only the needed bytes are read, counted by the program and by the operating system, within the memory given.

Reported by the export itself (`run.processes` of the manifest). Metadata and the heads of records are read too, at
most 8 KiB per record, so the tensors here are large enough for that to be small beside them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from support.exports import run_command  # noqa: E402
from support.small_models import LLAMA, SmallModel, small_model  # noqa: E402
from support.torch_dist import megatron_chunks, write_torch_dist  # noqa: E402

HOST_MEMORY = 64 << 20
WIDE: dict[str, Any] = {
    "num_layers": 2, "hidden_size": 1536, "ffn_hidden_size": 1536, "num_attention_heads": 16, "num_query_groups": 16,
    "kv_channels": 96, "padded_vocab_size": 1536,
}  # fmt: skip
DEEP = {**WIDE, "num_layers": 4, "hidden_size": 1024, "ffn_hidden_size": 1024, "kv_channels": 64}


def with_optimizer(model: SmallModel) -> dict[str, torch.Tensor]:
    """Adam's state beside every weight, as much again and more."""
    state = {f"optimizer.state.exp_avg.{name}": tensor for name, tensor in model.tensors.items()}
    return model.tensors | state


def export_statistics(checkpoint: Path, output: Path, *options: object) -> list[dict[str, Any]]:
    process = run_command("export", checkpoint, output, *options)
    assert process.returncode == 0, process.stderr
    manifest = json.loads((output / "export_manifest.json").read_text())
    return manifest["run"]["processes"]


CASES = {
    "tp8 to tp2": (megatron_chunks(tp=8), ("--tp", 2), 1.02),
    "tp2 to tp2": (megatron_chunks(tp=2), ("--tp", 2), 1.02),
    "pp4 with optimizer to pp1": (megatron_chunks(pp=4), (), 1.02),
    "tp2 to tp8": (megatron_chunks(tp=2), ("--tp", 8), 1.3),
}


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path, int]]:
    """(name, checkpoint, bytes of its weights); each checkpoint is made once."""
    folder = tmp_path_factory.mktemp("io")
    model = small_model({**LLAMA, **DEEP} if "pp4" in request.param else {**LLAMA, **WIDE})
    tensors = with_optimizer(model) if "optimizer" in request.param else model.tensors
    write_torch_dist(folder / "c", tensors, args=model.args, chunks=CASES[request.param][0])
    yield request.param, folder / "c", sum(tensor.nbytes for tensor in model.tensors.values())
    shutil.rmtree(folder)


@pytest.mark.parametrize("num_processes", [1, 4])
def test_bytes_read_and_memory(
    case: tuple[str, Path, int], num_processes: int, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    name, checkpoint, num_bytes = case
    _, options, limit = CASES[name]
    options = (*options, "--num-processes", num_processes, "--host-memory", HOST_MEMORY)
    processes = export_statistics(checkpoint, tmp_path / "out", *options)
    assert len(processes) == num_processes
    needed = sum(process["bytes_needed"] for process in processes)
    norms = 4 * 5 * 2048 * 2 * num_processes  # read by every process that writes them
    assert num_bytes <= needed <= num_bytes + norms
    growth = max(process["peak_memory"] - process["memory_at_start"] for process in processes)
    record_property("memory_growth", growth)
    for counter in ("bytes_read", "bytes_read_by_calls"):
        ratio = sum(process[counter] for process in processes) / needed
        record_property(counter, ratio)
        print(f"{name}, {num_processes} processes: {counter} {ratio:.4f} x needed, memory +{growth >> 10} KiB")
        assert 1.0 <= ratio <= limit
    assert growth <= HOST_MEMORY
    shutil.rmtree(tmp_path / "out")


def test_a_smaller_budget_makes_smaller_buffers(tmp_path: Path) -> None:
    """With casts, and a checkpoint many times the budget."""
    model = small_model({**DEEP, **LLAMA, "num_layers": 3})
    checkpoint = write_torch_dist(tmp_path / "c", model.tensors, args=model.args)
    growth = {}
    for budget in (64 << 20, 4 << 20):
        options = ("--host-memory", budget, "--num-processes", 1, "--dtype", "float32")
        (statistics,) = export_statistics(checkpoint, tmp_path / str(budget), *options)
        growth[budget] = statistics["peak_memory"] - statistics["memory_at_start"]
    print("memory growth by budget", growth)
    assert all(used <= budget + (4 << 20) for budget, used in growth.items())  # the interpreter's own on top
    assert growth[4 << 20] < growth[64 << 20]


@pytest.mark.parametrize("num_processes", [1, 3])
def test_two_targets_in_one_pass_read_no_source_byte_twice(tmp_path: Path, num_processes: int) -> None:
    model = small_model({**LLAMA, **WIDE})
    checkpoint = write_torch_dist(tmp_path / "c", model.tensors, args=model.args, chunks=megatron_chunks(tp=2))
    options = ("--target", "trtllm", "--target", "hf", "--tp", 2, "--num-processes", num_processes)
    process = run_command("export", checkpoint, tmp_path / "out", *options)
    assert process.returncode == 0, process.stderr
    statistics = json.loads((tmp_path / "out" / "hf" / "export_manifest.json").read_text())["run"]["processes"]
    weights = sum(tensor.nbytes for tensor in model.tensors.values())
    assert sum(each["bytes_read"] for each in statistics) <= 1.02 * weights
    assert sum(each["bytes_written"] for each in statistics) > 1.9 * weights


@pytest.mark.parametrize("scheme, num_processes", [("int8_sq", 1), ("int4_awq", 3)])
def test_scales_are_needed_and_read_like_weights(
    scheme: str, num_processes: int, quantized_checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    """Amax of rows and blocks lie beside the weights; of the heads of records each process reads its own."""
    options = ("--tp", 1, "--num-processes", num_processes)
    processes = export_statistics(quantized_checkpoints[scheme], tmp_path / "out", *options)
    heads = 8192 * 60 * num_processes
    needed, read = (sum(process[key] for process in processes) for key in ("bytes_needed", "bytes_read"))
    print(f"{scheme}, {num_processes} processes: needed {needed}, read {read}")
    assert needed <= read <= needed + heads
