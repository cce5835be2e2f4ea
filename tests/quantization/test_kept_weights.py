"""Weights whose amax has to be found: kept from measuring to the transfer, or read twice, with the same bytes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.exports import export, run_command
from support.quantizable import llama
from support.quantized import export_here
from support.torch_dist import Chunk

from dist_export.convert.measuring import KeptBytes, room_for_kept
from dist_export.quantization import QuantizationOptions
from dist_export.targets.huggingface.target import HuggingFaceOptions
from dist_export.targets.trtllm.target import TrtllmOptions

ROWS = QuantizationOptions(algorithm="fp8_per_channel")
PLENTY, NOTHING = 1 << 30, 1 << 20


def by_columns(name: str, tensor: torch.Tensor) -> Iterator[Chunk]:
    """As two training ranks save them."""
    if not name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        yield 0, (0,) * tensor.dim(), tuple(tensor.shape)
        return
    half = tensor.shape[1] // 2
    for rank in range(2):
        yield rank, (0, rank * half), (tensor.shape[0], half)


def bytes_read(output: Path) -> int:
    """By all processes together, as the manifest says."""
    processes = json.loads((output / "export_manifest.json").read_text())["run"]["processes"]
    return sum(each["bytes_read"] for each in processes)


def tensor_bytes(output: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(output.glob("*.safetensors"))]


@pytest.mark.parametrize("target", [TrtllmOptions(tp_size=4), HuggingFaceOptions()])
def test_bytes_are_the_same_and_read_once(target: Any, tmp_path: Path) -> None:
    model = llama()
    checkpoint, outputs = model.write(tmp_path / "c", chunks=by_columns), {}
    num_bytes = sum(2 * model.weight(name).numel() for name in model.linears)
    for name, room in (("kept", PLENTY), ("twice", NOTHING), ("partly", (16 << 20) + num_bytes // 2)):
        outputs[name] = export_here(checkpoint, tmp_path / name, target, quantization=ROWS, host_memory=room)
    assert tensor_bytes(outputs["kept"]) == tensor_bytes(outputs["twice"]) == tensor_bytes(outputs["partly"])
    kept, twice, partly = (bytes_read(each) for each in outputs.values())
    assert twice - kept == num_bytes
    assert num_bytes / 3 < partly - kept < 2 * num_bytes / 3


def test_every_process_keeps_what_it_transfers(tmp_path: Path) -> None:
    """Those of three measure the rows that they will write: what is read does not depend on their number."""
    model, reads = llama(), {}
    checkpoint = model.write(tmp_path / "c", chunks=by_columns)
    options = ("--tp", 2, "--quantization", "fp8_per_channel", "--host-memory")
    for number, room in ((1, "1g"), (3, "1g"), (3, "1m")):
        output = export(checkpoint, tmp_path / f"o{number}{room}", *options, room, "--num-processes", number)
        reads[number, room] = bytes_read(output), tensor_bytes(output)
    assert reads[1, "1g"][1] == reads[3, "1g"][1] == reads[3, "1m"][1]
    assert reads[3, "1m"][0] - reads[3, "1g"][0] == sum(2 * model.weight(name).numel() for name in model.linears)


def test_the_plan_says_what_it_takes(tmp_path: Path) -> None:
    model = llama()
    checkpoint = model.write(tmp_path / "c")
    command = ("plan", checkpoint, "--tp", 2, "--quantization", "fp8_per_channel")
    assert "measured (weights kept in memory: " in run_command(*command).stdout
    facts = json.loads(run_command(*command, "--json").stdout)["targets"][0]["quantization"]
    num_bytes = sum(2 * model.weight(name).numel() for name in model.linears)
    assert (facts["bytes_kept_in_memory"], facts["bytes_read_twice"]) == (num_bytes, 0)
    assert facts["bytes_measured"] == num_bytes


def test_a_budget_is_for_buffers_first() -> None:
    assert room_for_kept(64 << 20, num_threads=2) == 48 << 20
    assert room_for_kept(8 << 20, num_threads=2) == 0


def test_kept_parts_are_joined_and_nothing_else_is_made_up() -> None:
    kept, data = KeptBytes(limit=24), bytes(range(100))
    assert kept.add(0, 10, memoryview(data)[10:20])
    assert kept.add(0, 20, memoryview(data)[20:30])
    assert not kept.add(0, 30, memoryview(data)[30:40]), "beyond the limit"
    assert kept.num_bytes == 20

    def read(file: int, first: int, end: int) -> bytes | None:
        buffer = bytearray(end - first)
        return bytes(buffer) if kept.fill(file, first, memoryview(buffer)) else None

    assert read(0, 12, 27) == data[12:27]
    assert read(0, 10, 30) == data[10:30]
    assert [read(0, 9, 12), read(0, 28, 31), read(0, 40, 41), read(1, 12, 14)] == [None] * 4
