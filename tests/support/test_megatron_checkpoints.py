"""The made checkpoints are what the other tests take them for."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("megatron.core")

from support.megatron_checkpoints import (  # noqa: E402
    SCRIPT,
    latest_iteration,
    make_checkpoint,
    per_layer_weights,
    reference_weights,
)

VARIANTS = [
    {"tp": 2, "pp": 2},
    {"tp": 2, "pp": 1, "per_layer": True, "optimizer": True},
    {"tp": 1, "pp": 2, "singleton": True},
]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_the_weights_do_not_depend_on_the_layout(
    megatron_checkpoint: Callable[..., Path], variant: dict[str, int | bool]
) -> None:
    expected = per_layer_weights(latest_iteration(megatron_checkpoint(vocab=257)))
    actual = per_layer_weights(latest_iteration(megatron_checkpoint(vocab=257, **variant)))
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        rows = 257 if name in ("embedding.word_embeddings.weight", "output_layer.weight") else None
        torch.testing.assert_close(actual[name][:rows], tensor[:rows], rtol=0, atol=0)


def test_every_tensor_differs_and_norms_take_the_added_one_exactly(megatron_checkpoint: Callable[..., Path]) -> None:
    weights = per_layer_weights(latest_iteration(megatron_checkpoint(style="nemotron", tp=2)))
    assert len({tuple(tensor.flatten()[:32].tolist()) for tensor in weights.values()}) == len(weights)
    norms = [tensor for name, tensor in weights.items() if name.endswith(("norm.weight", "norm_weight"))]
    assert len(norms) == 9
    for norm in norms:
        assert norm.float().abs().max() <= 0.5
        torch.testing.assert_close((norm + 1).float(), norm.float() + 1, rtol=0, atol=0)


def test_the_optimizer_is_saved_beside_the_weights(megatron_checkpoint: Callable[..., Path]) -> None:
    folder = latest_iteration(megatron_checkpoint(vocab=257, tp=2, pp=1, per_layer=True, optimizer=True))
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    keys = set(FileSystemReader(folder).read_metadata().state_dict_metadata)
    for name in reference_weights(folder):
        for state in ("exp_avg", "exp_avg_sq", "fp32_param"):
            assert f"optimizer.state.{state}.{name}" in keys


def test_a_failure_carries_what_the_script_said(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="3 processes do not make tp 2 x pp 1; start 2"):
        make_checkpoint(tmp_path, num_processes=3, tp=2)


def test_importing_the_programs_changes_nothing() -> None:
    """No environment variable: whatever runs in the process afterwards sees its GPUs."""
    code = "import os; before = dict(os.environ); import make_checkpoint, megatron_on_cpu; assert before == os.environ"
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(SCRIPT.parent)}, check=True)
