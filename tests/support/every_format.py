"""One small model in every format that can be read: format -> a function that writes it and names what to open."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed import checkpoint as dcp

from support.legacy import as_classic, save_again
from support.other_formats import pack, write_bridge, write_nemo2, write_nemo_folder, write_zarr
from support.small_models import LLAMA, SmallModel, small_model
from support.torch_dist import megatron_chunks, write_torch_dist

SPEC_NAMES = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}
"""Names in torch_dist -> those of the modules in the local layer spec, as legacy and DCP checkpoints have them."""
ITERATION = "iter_0000010"


def plain_model(**args: Any) -> SmallModel:
    """A Llama without grouped queries, which classic models of the older releases do not have."""
    return small_model(LLAMA, **{"group_query_attention": False, "num_query_groups": 4, **args})


def rank_states(model: SmallModel, tp: int, pp: int) -> dict[tuple[int, int], dict[str, Any]]:
    """(tp rank, pp rank) -> its state dict: local layers, gate and up of the rank one after the other."""
    states: dict[tuple[int, int], dict[str, Any]] = {}
    per_stage = model.args["num_layers"] // pp
    for name, tensor in model.per_layer().items():
        parts = name.split(".")
        stage = pp - 1 if name.startswith(("decoder.final", "output_layer")) else 0
        if parts[1] == "layers":
            stage, local = divmod(int(parts[2]), per_stage)
            name = ".".join([*parts[:2], str(local), *parts[3:]])
        for rank in range(tp):
            states.setdefault((rank, stage), {})[name] = _shard(name, tensor, rank, tp).clone()
    return states


def _shard(name: str, tensor: Any, rank: int, tp: int) -> Any:
    if "norm" in name:
        return tensor
    if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        return tensor.chunk(tp, 1)[rank]
    if "linear_fc1" in name:
        return torch.cat([half.chunk(tp)[rank] for half in tensor.chunk(2)])
    return tensor.chunk(tp)[rank]


def spec_name(name: str) -> str:
    """A name of torch_dist as the local layer spec has it."""
    for dist_name, own in SPEC_NAMES.items():
        name = name.replace(dist_name, own)
    return name


def write_legacy(top: Path, model: SmallModel, *, tp: int = 2, pp: int = 2, zipped: bool = True, **more: Any) -> Path:
    """A --save folder with --ckpt-format torch (megatron/training/checkpointing.py, `generate_state_dict`)."""
    args = {**model.args, "tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp}
    for (rank, stage), weights in rank_states(model, tp, pp).items():
        folder = top / ITERATION / (f"mp_rank_{rank:02d}_{stage:03d}" if pp > 1 else f"mp_rank_{rank:02d}")
        folder.mkdir(parents=True)
        state = {
            "args": argparse.Namespace(**args),
            "checkpoint_version": 3.0,
            "iteration": 10,
            "model": {spec_name(name): tensor for name, tensor in weights.items()},
            "optimizer": {"state": {0: {"exp_avg": torch.zeros(4, 4)}}, "param_groups": [{"lr": 1e-3}]},
            "rng_state": [{"random_rng_state": (3, (1, 2)), "cuda_rng_state": torch.zeros(16, dtype=torch.uint8)}],
            **more,
        }
        torch.save(state, folder / "model_optim_rng.pt", _use_new_zipfile_serialization=zipped)
    (top / "latest_checkpointed_iteration.txt").write_text("10")
    return top


def write_classic(top: Path, model: SmallModel) -> Path:
    """The same of megatron.legacy.model."""
    core = write_legacy(top.with_name(top.name + "_core"), model, tp=2, pp=1)
    change = as_classic(version=3.0, stack="encoder", attention="self_attention", norm="norm")
    return save_again(core, top, change)


def write_dcp(folder: Path, model: SmallModel, *, split: bool, local_spec: bool = False, more: Any = None) -> Path:
    """The state dict of `save_checkpoint` with --ckpt-format torch_dcp (megatron/training/checkpointing.py); `split`
    divides gate and up as fsdp_dtensor does (megatron/core/transformer/fsdp_dtensor_checkpoint.py,
    `handle_swiglu_in_state_dict`)."""
    weights: dict[str, Any] = {}
    per_layer = any(re.match(r"decoder\.layers\.\d", name) for name in model.tensors)
    for name, tensor in ((model.tensors if per_layer else model.per_layer()) | (more or {})).items():
        name = spec_name(name) if local_spec else name
        if split and re.search(r"linear_fc1\.weight\d*$", name):
            weights[name + "_w"], weights[name + "_v"] = (half.clone() for half in tensor.chunk(2))
        else:
            weights[name] = tensor
    weights["decoder.layers.0.mlp.linear_fc1._extra_state"] = torch.zeros(0, dtype=torch.uint8)
    state = {
        "model": {f"module.{name}": tensor for name, tensor in weights.items()},
        "optimizer": {"state": {"module.embedding.word_embeddings.weight": {"exp_avg": torch.zeros(64, 32)}}},
        "args": argparse.Namespace(**model.args),
        "iteration": 10,
        "checkpoint_version": 3.0,
        "rng_state": [{"random_rng_state": (1, 2), "np_rng_state": None}],
    }
    dcp.save(state, checkpoint_id=folder, no_dist=True)
    return folder


def nemo_folder(folder: Path, model: SmallModel, **changes: Any) -> Path:
    """An extracted .nemo with torch_dist weights."""
    write_nemo_folder(folder, model, **changes)
    write_torch_dist(folder / "model_weights", model.tensors, args=None, prefix="model.")
    return folder


def nemo_zarr_folder(folder: Path, model: SmallModel) -> Path:
    """An extracted .nemo with zarr weights."""
    write_nemo_folder(folder, model)
    write_zarr(folder / "model_weights", model.tensors, args=None, prefix="model.")
    return folder


def nemo_rank_folder(folder: Path, model: SmallModel, *, tp: int = 2, pp: int = 1) -> Path:
    """An extracted .nemo with a state dict per rank (nemo/collections/nlp/parts/nlp_overrides.py,
    `NLPSaveRestoreConnector.save_to`)."""
    write_nemo_folder(folder, model, tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp)
    for (rank, stage), state in rank_states(model, tp, pp).items():
        name = f"mp_rank_{rank:02d}" if pp == 1 else f"tp_rank_{rank:02d}_pp_rank_{stage:03d}"
        file = folder / "model_weights.ckpt" if (tp, pp) == (1, 1) else folder / name / "model_weights.ckpt"
        file.parent.mkdir(exist_ok=True)
        torch.save({f"model.{name}": tensor for name, tensor in state.items()}, file)
    return folder


def _packed(write: Callable[[Path, SmallModel], Path], mode: str = "w:") -> Callable[[Path, SmallModel], Path]:
    """As an archive."""
    return lambda path, model: pack(write(path.with_name(path.name + "_extracted"), model), path, mode=mode)


FORMATS: dict[str, Callable[[Path, SmallModel], Path]] = {
    "torch_dist": lambda path, model: write_torch_dist(
        path, model.tensors, args=model.args, chunks=megatron_chunks(tp=2, pp=2)
    ),
    "torch_dist-0.19": lambda path, model: write_torch_dist(path, model.tensors, args=model.args, common="record"),
    "torch_dist-per-layer": lambda path, model: write_torch_dist(path, model.per_layer(), args=model.args),
    "zarr": lambda path, model: write_zarr(path, model.tensors, args=model.args, parts=3),
    "legacy": write_legacy,
    "legacy-before-zip": lambda path, model: write_legacy(path, model, pp=1, zipped=False),
    "legacy-classic": write_classic,
    "nemo1-folder": nemo_folder,
    "nemo1.nemo": _packed(nemo_folder),
    "nemo1-compressed.nemo": _packed(nemo_folder, "w:gz"),
    "nemo1-zarr.nemo": _packed(nemo_zarr_folder),
    "nemo1-ranks.nemo": _packed(nemo_rank_folder),
    "nemo2": write_nemo2,
    "bridge": write_bridge,
    "bridge-nested": lambda path, model: write_bridge(path, model, nested=True),
    "torch_dcp": lambda path, model: write_dcp(path, model, split=False, local_spec=True),
    "fsdp_dtensor": lambda path, model: write_dcp(path, model, split=True),
}
"""The first is what the others are compared with."""
