"""Quantised models saved again as legacy rank files, with the shapes that ModelOpt's buffers have in a state dict."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from support.megatron_checkpoints import per_layer_weights
from support.quantized import read

Tensors = dict[str, torch.Tensor]
COLUMN_PARALLEL = re.compile(r"\.(linear_qkv|linear_fc1)\.")
ROW_PARALLEL = re.compile(r"\.(linear_proj|linear_fc2)\.")


def global_tensors(iteration: Path, tp: int) -> Tensors:
    """A torch_dist checkpoint's tensors, a key per layer, the amax of a gated fc1 in the order gate, up."""
    tensors = per_layer_weights(iteration)
    for name, tensor in tensors.items():
        if name.endswith("linear_fc1.weight_quantizer._amax") and tensor.numel() > 1:
            tensors[name] = tensor.view(tp, 2, len(tensor) // 2 // tp, -1).transpose(0, 1).reshape(tensor.shape)
    return tensors


def of_rank(name: str, tensor: torch.Tensor, rank: int, tp: int) -> torch.Tensor:
    """What tp rank `rank` has of a tensor in its state dict."""
    if "_quantizer." in name and tensor.numel() == 1:
        return tensor.reshape(())
    if re.search(r"(word_embeddings|output_layer)\.weight$", name):
        return tensor.chunk(tp)[rank]
    if tensor.dim() < 2:
        is_split = name.endswith("_pre_quant_scale") and ROW_PARALLEL.search(name)
        return tensor.chunk(tp)[rank] if is_split else tensor
    if COLUMN_PARALLEL.search(name):
        parts = tensor.chunk(2) if "linear_fc1" in name else (tensor,)
        tensor = torch.cat([part.chunk(tp)[rank] for part in parts])
    elif ROW_PARALLEL.search(name) and tensor.shape[1] > 1:
        tensor = tensor.chunk(tp, 1)[rank]
    return tensor.reshape(-1, 1) if name.endswith("weight_quantizer._amax") else tensor


def layer_states(iteration: Path) -> dict[str, Any]:
    """Name -> the object that the module's ``get_extra_state`` returned."""
    return {name.partition("/")[0]: each[0] for name, each in read(iteration)[1].items()}


def rank_tensors(checkpoint: Path, rank: int, tp: int) -> Tensors:
    """A rank's tensors, as `tp` ranks would have the model."""
    iteration = checkpoint / "iter_0000010"
    tensors = global_tensors(iteration, int(common_state(iteration)["args"].tensor_model_parallel_size))
    return {name: of_rank(name, tensor, rank, tp).clone() for name, tensor in tensors.items()}


def common_state(iteration: Path) -> dict[str, Any]:
    """common.pt, which only Megatron's own enums keep from being plain values."""
    state: dict[str, Any] = torch.load(iteration / "common.pt", weights_only=False)
    return state


def save_as_legacy(checkpoint: Path, folder: Path, *, tp: int, changes: dict[int, Tensors] | None = None) -> Path:
    """Write a --save folder's model as files of `tp` ranks; `changes` replace tensors of some ranks.

    ModelOpt's state is in every rank's file, where Megatron puts it.
    """
    iteration = checkpoint / "iter_0000010"
    common, states = common_state(iteration), layer_states(iteration)
    common["args"].tensor_model_parallel_size = tp
    modelopt = torch.load(iteration / "modelopt_state" / "common.pt", weights_only=False)
    for rank in range(tp):
        model = {**rank_tensors(checkpoint, rank, tp), **states, **(changes or {}).get(rank, {})}
        path = folder / "iter_0000010" / f"mp_rank_{rank:02d}" / "model_optim_rng.pt"
        path.parent.mkdir(parents=True)
        torch.save({**common, "model": model, "modelopt_state": modelopt}, path)
    (folder / "latest_checkpointed_iteration.txt").write_text("10")
    return folder
