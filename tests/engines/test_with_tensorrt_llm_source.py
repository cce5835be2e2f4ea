"""Exports of all parts of the adapter's check against TensorRT-LLM's own Python of 0.14, where its source is at hand.

    DIST_EXPORT_TRTLLM_SOURCE   the ``tensorrt_llm`` folder of a source checkout of 0.14
    DIST_EXPORT_TRTLLM_BOOT     the folder of a boot.py that makes it importable without TensorRT, CUDA and bindings
    DIST_EXPORT_TRTLLM_PYTHON   an interpreter with what it imports (torch, transformers 4.57, mpi4py, …)

Skipped without them. What is real and what is a stand-in: check_with_tensorrt_llm_source.py.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from support.exports import REPOSITORY, export

VARIABLES = ("DIST_EXPORT_TRTLLM_SOURCE", "DIST_EXPORT_TRTLLM_BOOT", "DIST_EXPORT_TRTLLM_PYTHON")
SCRIPT = REPOSITORY / "tests" / "engines" / "check_with_tensorrt_llm_source.py"

pytestmark = pytest.mark.skipif(
    any(name not in os.environ for name in VARIABLES), reason=f"TensorRT-LLM's source: set {', '.join(VARIABLES)}"
)


def check(*exports: Path) -> subprocess.CompletedProcess[str]:
    source, boot, python = (os.environ[name] for name in VARIABLES)
    return subprocess.run(
        [python, "-W", "ignore", str(SCRIPT), boot, *map(str, exports)],
        env={**os.environ, "TRTLLM_SRC": source, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip


def test_every_rank_loads_and_goes_up_to_build(megatron_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """Real Megatron models: KV heads fewer than tp, pipeline stages, experts over ranks, tied embeddings."""
    llama = megatron_checkpoint(style="llama", kv_groups=2)
    exports = [
        export(llama, tmp_path / "tp4", "--tp", 4),
        export(llama, tmp_path / "tp2pp2", "--tp", 2, "--pp", 2),
        export(megatron_checkpoint(style="mixtral", layers=2), tmp_path / "moe", "--tp", 2, "--moe-ep", 2),
        export(megatron_checkpoint(style="gpt"), tmp_path / "gpt", "--tp", 2, "--pp", 2),
    ]
    process = check(*exports)
    assert process.returncode == 0, process.stdout + process.stderr
    assert process.stdout.count("sets of options") == 4 + 4 + 2 + 4


def test_a_missing_tensor_is_told_by_its_loader(megatron_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    whole = export(megatron_checkpoint(style="llama", kv_groups=2), tmp_path / "out", "--tp", 2)
    path = whole / "rank1.safetensors"
    tensors = load_file(path)
    del tensors["transformer.layers.0.mlp.proj.weight"]
    save_file(tensors, path)
    process = check(whole)
    assert process.returncode == 1, process.stdout + process.stderr
    assert "rank 1: FAILED: RuntimeError: Required but not provided tensors" in process.stdout
