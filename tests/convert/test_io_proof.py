"""Only the needed bytes are read, counted by the program and by the operating system, within the memory given.

Reported by the export itself (`run.processes` of the manifest). Metadata and the heads of records are read too, at
most 8 KiB per record, so the tensors here are large enough for that to be small beside them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from support.exports import run_command  # noqa: E402
from support.small_models import LLAMA, SmallModel, small_model  # noqa: E402
from support.torch_dist import megatron_chunks, write_torch_dist  # noqa: E402

HOST_MEMORY = 64 << 20
SIZES: dict[str, Any] = {
    "num_layers": 4, "hidden_size": 1024, "ffn_hidden_size": 2048, "num_attention_heads": 8, "num_query_groups": 8,
    "kv_channels": 128, "padded_vocab_size": 1024,
}  # fmt: skip
MODEL = small_model(LLAMA, **SIZES)  # 88 MB


def with_optimizer(model: SmallModel) -> dict[str, torch.Tensor]:
    """Adam's state beside every weight, as much again and more."""
    state = {f"optimizer.state.exp_avg.{name}": tensor for name, tensor in model.tensors.items()}
    return model.tensors | state


def export_statistics(tmp_path: Path, tensors: dict[str, torch.Tensor], chunks: Any, *options: object) -> list[dict]:
    checkpoint = write_torch_dist(tmp_path / "c", tensors, args=MODEL.args, chunks=chunks)
    output = tmp_path / "out"
    process = run_command("export", checkpoint, output, "--host-memory", "64m", *options)
    assert process.returncode == 0, process.stderr
    manifest = json.loads((output / "export_manifest.json").read_text())
    return manifest["run"]["processes"]


CASES = {
    "tp8 to tp2": (megatron_chunks(tp=8), ("--tp", 2), 1.02),
    "tp2 to tp2": (megatron_chunks(tp=2), ("--tp", 2), 1.02),
    "pp4 with optimizer to pp1": (megatron_chunks(pp=4), (), 1.02),
    "tp2 to tp8": (megatron_chunks(tp=2), ("--tp", 8), 1.3),
}


@pytest.mark.parametrize("num_processes", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_bytes_read_and_memory(case: str, num_processes: int, tmp_path: Path, record_property: Any) -> None:
    chunks, options, limit = CASES[case]
    tensors = with_optimizer(MODEL) if "optimizer" in case else MODEL.tensors
    processes = export_statistics(tmp_path, tensors, chunks, "--num-processes", num_processes, *options)
    assert len(processes) == num_processes
    needed = sum(process["bytes_needed"] for process in processes)
    weights = sum(tensor.nbytes for tensor in MODEL.tensors.values())
    assert weights <= needed <= 1.01 * weights if num_processes == 1 else needed >= weights
    ratios = {
        name: sum(process[name] for process in processes) / needed for name in ("bytes_read", "bytes_read_by_calls")
    }
    growth = max(process["peak_memory"] - process["memory_at_start"] for process in processes)
    print(case, num_processes, {name: round(ratio, 4) for name, ratio in ratios.items()}, growth >> 10, "KiB")
    for name, ratio in ratios.items():
        record_property(name, ratio)
        assert 1.0 <= ratio <= limit, (name, ratio)
    assert growth <= HOST_MEMORY


def test_a_smaller_budget_makes_smaller_buffers(tmp_path: Path) -> None:
    """Casts to float32 included; the checkpoint is many times the budget."""
    checkpoint = write_torch_dist(tmp_path / "c", MODEL.tensors, args=MODEL.args)
    growth = {}
    for budget in ("64m", "4m"):
        options = ("--host-memory", budget, "--num-processes", 1, "--dtype", "float32", "--device", "cpu")
        process = run_command("export", checkpoint, tmp_path / budget, *options)
        assert process.returncode == 0, process.stderr
        (statistics,) = json.loads((tmp_path / budget / "export_manifest.json").read_text())["run"]["processes"]
        growth[budget] = statistics["peak_memory"] - statistics["memory_at_start"]
    assert growth["64m"] <= 64 << 20
    assert growth["4m"] < growth["64m"]
