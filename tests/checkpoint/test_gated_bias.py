"""Biases of gated layers: saved by several tp ranks, Megatron-Core up to 0.7 left them in the order of the ranks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from support.other_formats import exported, write_zarr_array  # noqa: E402
from support.small_models import GPT, small_model  # noqa: E402
from support.torch_dist import grid_chunks, write_torch_dist  # noqa: E402

from dist_export.checkpoint import torch_dist, zarr_dist  # noqa: E402
from dist_export.errors import ExportError  # noqa: E402

MODEL = small_model(GPT, swiglu=True)
FC1 = "decoder.layers.mlp.linear_fc1."
MESSAGE = r"linear_fc1\.bias: every 48 rows are a training rank's gate and up, .*; load it with that release and"


def cuts(weight_parts: int, bias_parts: int) -> Callable[[str, torch.Tensor], tuple[int, ...]]:
    """Parts of the rows of fc1; every layer is apart."""

    def of(name: str, tensor: torch.Tensor) -> tuple[int, ...]:
        layers = tensor.shape[0] if ".layers." in name else 1
        if name.startswith(FC1):
            rows = weight_parts if name.endswith("weight") else bias_parts
            return (layers, rows, 1)[: tensor.dim()]
        return (layers, *(1 for _ in tensor.shape[1:]))

    return of


def test_ranks_that_saved_gate_and_up_of_the_bias_together(tmp_path: Path) -> None:
    """0.7, tp 2 (transformer/mlp.py, `_sharded_state_dict_for_glu`): the weight in four parts, the bias in two."""
    folder = write_torch_dist(tmp_path / "c", MODEL.tensors, args=MODEL.args, chunks=grid_chunks(cuts(4, 2)))
    with pytest.raises(ExportError, match=MESSAGE):
        torch_dist.read_index(folder)


def test_the_same_in_zarr(tmp_path: Path) -> None:
    for name, rows in (("weight", (1, 24, 32)), ("bias", (1, 48))):
        write_zarr_array(tmp_path / (FC1 + name), MODEL.tensors[FC1 + name], rows)
    with pytest.raises(ExportError, match=MESSAGE):
        zarr_dist.read_index(tmp_path)


def test_other_cuts_are_the_same_model(tmp_path: Path) -> None:
    """0.8 with tp 2, 0.7 with tp 1, a file of one chunk per tensor, and one cut by ranks alike."""
    found = []
    for number, parts in enumerate([(4, 4), (2, 1), (1, 1), (2, 2)]):
        folder = tmp_path / str(number)
        write_torch_dist(folder, MODEL.tensors, args=MODEL.args, chunks=grid_chunks(cuts(*parts)))
        found.append(exported(folder, tmp_path / f"out{number}"))
    assert all(each == found[0] for each in found)
