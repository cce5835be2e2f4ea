"""Save the model chunks of a rank as Megatron-LM does: as a distributed checkpoint, or as legacy rank files."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from megatron_on_cpu import STYLES
from saved_arguments import training_arguments

Chunks = list[Any]


def save(chunks: Chunks, options: argparse.Namespace) -> None:
    """Write the iteration folder, then the tracker file. Called by every rank."""
    folder: Path = options.out / f"iter_{options.iteration:07d}"
    folder.mkdir(parents=True, exist_ok=True)
    {"torch_dist": save_torch_dist, "legacy": save_legacy}[options.format](folder, chunks, options)
    torch.distributed.barrier()
    if torch.distributed.get_rank() == 0:
        (options.out / "latest_checkpointed_iteration.txt").write_text(str(options.iteration))
        print(f"saved {folder}")


def save_torch_dist(folder: Path, chunks: Chunks, options: argparse.Namespace) -> None:
    """`.metadata` and `.distcp` files, by megatron.core.dist_checkpointing. Called by every rank."""
    from megatron.core import dist_checkpointing, parallel_state

    metadata = {
        "non_homogeneous_layers": options.per_layer or options.singleton,
        "singleton_local_shards": options.singleton,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }
    state = _common_state(options) | _by_chunk(chunks, lambda chunk: chunk.sharded_state_dict(metadata=metadata))
    if options.optimizer:
        state["optimizer"] = _sharded_optimizer(chunks, metadata)
    del metadata["dp_cp_group"]  # a process group is nothing to save
    dist_checkpointing.save(state, str(folder), content_metadata=metadata)


def save_legacy(folder: Path, chunks: Chunks, options: argparse.Namespace) -> None:
    """This rank's `mp_rank_TT[_PPP][_EEE]/model_optim_rng.pt`, where it writes one.

    As Megatron-LM 0.10 to 0.17 does (megatron/training/checkpointing.py): the folder is named by
    `get_checkpoint_name`, and of ranks with the same experts the first alone saves (`save_checkpoint`).
    """
    from megatron.core import parallel_state

    if options.tp % options.etp:
        raise ValueError(f"ranks of expert tp {options.etp} would write the same files of tp {options.tp}")
    if parallel_state.get_expert_data_parallel_rank():
        return
    name = f"mp_rank_{parallel_state.get_tensor_model_parallel_rank():02d}"
    if options.pp > 1:
        name += f"_{parallel_state.get_pipeline_model_parallel_rank():03d}"
    if options.ep > 1:
        name += f"_{parallel_state.get_expert_model_parallel_rank():03d}"
    state = _common_state(options) | _by_chunk(chunks, lambda chunk: chunk.state_dict_for_save_checkpoint())
    if options.optimizer:
        optimizers = [_stepped(parameters) for parameters in _optimized(chunks)]
        saved = [
            {"optimizer": adam.state_dict(), "fp32_from_fp16_params": [[master.detach() for master in masters]]}
            for adam, masters in optimizers
        ]
        state["optimizer"] = saved[0] if len(saved) == 1 else saved  # as ChainedOptimizer.state_dict
    (folder / name).mkdir()
    torch.save(state, folder / name / "model_optim_rng.pt")


def _common_state(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "args": training_arguments(options, STYLES[options.style]),
        "checkpoint_version": 3.0,
        "iteration": options.iteration,
        "num_floating_point_operations_so_far": 0,
    }


def _by_chunk(chunks: Chunks, state_of: Callable[[Any], Any]) -> dict[str, Any]:
    """`model`, or `model0`, `model1`, … of virtual pipeline stages (`generate_state_dict`)."""
    if len(chunks) == 1:
        return {"model": state_of(chunks[0])}
    return {f"model{number}": state_of(chunk) for number, chunk in enumerate(chunks)}


def _optimized(chunks: Chunks) -> list[list[torch.Tensor]]:
    """The parameters of each optimizer: those of experts have one of their own (`get_megatron_optimizer`)."""
    named = [item for chunk in chunks for item in chunk.named_parameters()]
    dense = [parameter for name, parameter in named if ".experts." not in name]
    experts = [parameter for name, parameter in named if ".experts." in name]
    return [parameters for parameters in (dense, experts) if parameters]


def _stepped(parameters: list[torch.Tensor]) -> tuple[torch.optim.Optimizer, list[torch.Tensor]]:
    """AdamW and its fp32 copies of the weights, after one step on weights that are copies of their own."""
    masters = [parameter.detach().float().clone().requires_grad_() for parameter in parameters]
    for master in masters:
        master.grad = master.detach() * 0.5  # element by element, so that the layout does not matter
    adam = torch.optim.AdamW(masters, lr=1e-4, foreach=False)
    adam.step()
    return adam, masters


def _sharded_optimizer(chunks: Chunks, metadata: dict[str, Any]) -> dict[str, Any]:
    """State of the optimizers under Megatron's keys (`Float16OptimizerWithFloat16Params`, `ChainedOptimizer`)."""
    from megatron.core.dist_checkpointing.utils import add_prefix_for_sharding

    weights = [chunk.sharded_state_dict(metadata=metadata) for chunk in chunks]
    states = [_sharded_state(parameters, weights) for parameters in _optimized(chunks)]
    if len(states) == 1:
        return states[0]
    for number, state in enumerate(states):
        add_prefix_for_sharding(state, f"chained_{number}.")
    return {str(number): state for number, state in enumerate(states)}


def _sharded_state(parameters: list[torch.Tensor], weights: list[Any]) -> dict[str, Any]:
    from megatron.core.dist_checkpointing import optimizer as sharding

    adam, masters = _stepped(parameters)
    state: dict[str, Any] = adam.state_dict()
    to_shard = sharding.get_param_id_to_sharded_param_map(dict(enumerate(weights)), parameters)
    sharding.optim_state_to_sharding_state(state, to_shard, exclude_keys=("step",))
    fp32 = [
        sharding.make_sharded_optimizer_tensor(to_shard[number], master.detach(), "optimizer.state.fp32_param")
        for number, master in enumerate(masters)
    ]
    return {"optimizer": state, "fp32_from_fp16_params": [fp32]}
