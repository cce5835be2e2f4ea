"""Right exports verify: every target, layout and element type, every byte compared once, however many processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from msgspec import structs
from support.conformance import CHECKPOINTS as MODEL_IN
from support.conformance import WITHOUT_ENGINE
from support.small_models import GPT, LLAMA, NEMOTRON, SmallModel, small_model
from verify.faulty import change, export_to, messages, save, verify

from dist_export.targets.huggingface.target import HuggingFaceOptions
from dist_export.targets.trtllm.tables import EmbeddingSharding
from dist_export.targets.trtllm.target import TrtllmOptions
from dist_export.verify import compare
from dist_export.verify.findings import VerifyReport
from dist_export.verify.run import find_exports

REPOSITORY = Path(__file__).parents[2]
CHECKPOINTS = REPOSITORY / "tests" / "conformance" / "checkpoints"
MODELS = {
    "llama": small_model(LLAMA),
    "llama tied": small_model(LLAMA, untie_embeddings_and_output_weights=False),
    "llama with qkv bias": small_model(LLAMA, add_qkv_bias=True),
    "llama float32": small_model(LLAMA, dtype=torch.float32),
    "gpt": small_model(GPT, num_query_groups=4, group_query_attention=False),
    "gpt per layer": SmallModel(small_model(GPT).args, small_model(GPT).per_layer()),
    "nemotron": small_model(NEMOTRON),
}
VOCABULARY = {"vocab_size": 61}


@pytest.mark.parametrize("name", MODELS)
def test_every_layout_of_every_family_verifies(name: str, tmp_path: Path) -> None:
    checkpoint = save(tmp_path / "checkpoint", MODELS[name])
    targets: list[TrtllmOptions | HuggingFaceOptions] = [
        TrtllmOptions(),
        TrtllmOptions(tp_size=2, pp_size=2),
        TrtllmOptions(tp_size=4, dtype="float32"),
        TrtllmOptions(tp_size=2, dtype="float16", embedding=EmbeddingSharding(True, 1)),
        TrtllmOptions(tp_size=2, embedding=EmbeddingSharding(False)),
    ]
    if name != "gpt per layer":  # GPT-2 of transformers has no grouped query attention
        targets += [HuggingFaceOptions(), HuggingFaceOptions(dtype="float32", file_bytes=20_000)]
    for number, target in enumerate(targets):
        output = export_to(checkpoint, tmp_path / f"out{number}", target, overrides=VOCABULARY)
        report = verify(checkpoint, output)
        assert report.ok and not report.warnings, (target, str(report))
        assert report.num_bytes_compared == report.num_bytes_checked, "every byte of the output, each once"
        tables = 1 + bool(MODELS[name].args["untie_embeddings_and_output_weights"])
        assert report.elements_left_out == {"padding rows of the vocabulary": tables * 3 * 32}


@pytest.mark.parametrize("name", [path.name for path in sorted(CHECKPOINTS.iterdir())])
def test_checkpoints_written_by_megatron(name: str, tmp_path: Path) -> None:
    targets = [TrtllmOptions(tp_size=2, pp_size=2), HuggingFaceOptions()]
    if MODEL_IN[name] in WITHOUT_ENGINE:
        del targets[0]
    output = export_to(CHECKPOINTS / name, tmp_path / "out", *targets)
    assert [folder.name for folder in find_exports(output)] == (["hf", "trtllm"] if len(targets) == 2 else ["out"])
    for folder in find_exports(output):
        report = verify(CHECKPOINTS / name, folder)
        assert report.ok, str(report)


@pytest.mark.parametrize("layout", [(1, 1), (2, 2), (4, 1), (4, 2), (4, 4)])
def test_experts_in_every_division(layout: tuple[int, int], tmp_path: Path) -> None:
    checkpoint = CHECKPOINTS / "mixtral_core_0_16_pp2ep2"
    options = TrtllmOptions(tp_size=layout[0], pp_size=2, moe_ep_size=layout[1])
    report = verify(checkpoint, export_to(checkpoint, tmp_path / "out", options))
    assert report.ok, str(report)
    assert report.num_bytes_compared == report.num_bytes_checked


@pytest.mark.parametrize("band_bytes", [64, 200, 1 << 20])
def test_the_size_of_bands_changes_nothing(band_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "BAND_BYTES", band_bytes)
    checkpoint = save(tmp_path / "checkpoint", MODELS["gpt"])
    for number, target in enumerate((TrtllmOptions(tp_size=4), HuggingFaceOptions())):
        output = export_to(checkpoint, tmp_path / f"out{number}", target)
        assert verify(checkpoint, output).ok
        change(output, spoil)
        report = verify(checkpoint, output, "rebuild")
        assert [m.split("; ")[-1].split(",")[0] for m in messages(report)] == [EXPECTED[number]]


def spoil(files) -> None:
    """Several elements of one tensor: rows 1 to 3 of columns 2 to 4, of the weight as stored."""
    tensors = files.get("rank2.safetensors", files.get("model.safetensors"))
    name = next(name for name in tensors if name.endswith(("1.mlp.proj.weight", "1.mlp.c_proj.weight")))
    tensors[name][1:4, 2:5] ^= 0x0101


EXPECTED = [
    "rebuild: rank2.safetensors: transformer.layers.1.mlp.proj.weight: 9 of 384 elements differ from "
    "decoder.layers.mlp.linear_fc2.weight[1] (layer 1)",
    "rebuild: model.safetensors: transformer.h.1.mlp.c_proj.weight: 9 of 1536 elements differ from "
    "decoder.layers.mlp.linear_fc2.weight[1] (layer 1)",
]

PROGRAM = """
import json, sys
from pathlib import Path
from dist_export.runtime.launch import run_local
from dist_export.verify.run import verify_export

def rank_main(group):
    report = verify_export(Path(sys.argv[1]), Path(sys.argv[2]), group=group)
    Path(sys.argv[3], f"{group.rank}.json").write_text(report.to_json())
    return 0 if report.ok else 1

sys.exit(run_local(int(sys.argv[4]), rank_main))
"""


@pytest.mark.parametrize("num_processes", [2, 5])
def test_any_number_of_processes_finds_the_same(num_processes: int, tmp_path: Path) -> None:
    checkpoint = save(tmp_path / "checkpoint", MODELS["llama"])
    output = export_to(checkpoint, tmp_path / "out", TrtllmOptions(tp_size=2), overrides=VOCABULARY)
    assert run_distributed(checkpoint, output, tmp_path / "right", num_processes).ok
    change(output, lambda files: [each.fill(0x3F00) for each in files["rank1.safetensors"].values()])
    alone, together = verify(checkpoint, output), run_distributed(checkpoint, output, tmp_path / "wrong", num_processes)
    assert not alone.ok
    assert structs.replace(alone, seconds={}) == structs.replace(together, seconds={})


def run_distributed(checkpoint: Path, output: Path, folder: Path, num_processes: int) -> VerifyReport:
    """Verify with several processes; all of them must come to the same report."""
    folder.mkdir()
    process = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(checkpoint), str(output), str(folder), str(num_processes)],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    reports = {(folder / f"{rank}.json").read_text() for rank in range(num_processes)}
    assert len(reports) == 1, process.stderr
    report = VerifyReport.from_json(reports.pop())
    assert process.returncode == (0 if report.ok else 1), process.stderr
    assert json.loads(report.to_json())["ok"] is report.ok
    return report


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    model = small_model(LLAMA, hidden_size=512, ffn_hidden_size=4096, num_attention_heads=8, kv_channels=64)
    checkpoint = save(tmp_path / "checkpoint", model)
    output = export_to(checkpoint, tmp_path / "out", TrtllmOptions(tp_size=2))
    program = """
import sys
from pathlib import Path
from dist_export.runtime.usage import Usage
from dist_export.verify.run import verify_export
before = Usage.now().memory
assert verify_export(Path(sys.argv[1]), Path(sys.argv[2])).ok
assert "torch" not in sys.modules
print(Usage.now().peak_memory - before)
"""
    process = subprocess.run(
        [sys.executable, "-c", program, str(checkpoint), str(output)],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    assert sum(path.stat().st_size for path in output.iterdir()) > 27_000_000
    assert int(process.stdout) < 16_000_000
