"""Save real Megatron-Core models on CPU twice each: as legacy rank files and as torch_dist. Run as a script.

    python tests/support/save_legacy.py OUT '{"name": {"style": "llama", "tp": 2, "pp": 2, "vpp": 2}, …}'

Names and shards come from `GPTModel.state_dict_for_save_checkpoint`; rank folders are named, and ranks without a file
of their own left out, as Megatron-LM's `get_checkpoint_name` and `save_checkpoint` do. Each model is in
OUT/name/legacy and, with the same weights, in OUT/name/torch_dist.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "launch"))

import make_checkpoint
import megatron_on_cpu
import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from torch.multiprocessing.spawn import start_processes

DEFAULTS: dict[str, Any] = {"vpp": 1, "ep": 1, "etp": None, "experts": 0, "grouped": False, "world": None}
ITERATION = 10


def layout_of(given: dict[str, Any]) -> dict[str, Any]:
    """The options that make_checkpoint does not have."""
    return {name: given.get(name, default) for name, default in DEFAULTS.items()}


def options_of(out: Path, given: dict[str, Any]) -> argparse.Namespace:
    """The options of make_checkpoint.py."""
    line = [str(out)]
    for name, value in given.items():
        if name not in DEFAULTS:
            line += [f"--{name}", str(value)]
    return make_checkpoint.build_parser().parse_args(line)


def build(options: argparse.Namespace, layout: dict[str, Any], vp_stage: int | None) -> Any:
    """One model chunk of this rank."""
    style = megatron_on_cpu.STYLES[options.style]
    config = megatron_on_cpu.transformer_config(options, style)
    config.expert_model_parallel_size = layout["ep"]
    config.expert_tensor_parallel_size = layout["etp"] or options.tp
    if layout["vpp"] > 1:
        config.virtual_pipeline_model_parallel_size = layout["vpp"]
    if layout["experts"]:
        config.num_moe_experts = layout["experts"]
        config.moe_ffn_hidden_size = options.ffn
        config.moe_grouped_gemm = layout["grouped"]
        config.moe_use_legacy_grouped_gemm = layout["grouped"]
        config.moe_router_topk = 2
    spec = get_gpt_layer_local_spec(
        layout["experts"] or None,
        moe_grouped_gemm=layout["grouped"],
        moe_use_legacy_grouped_gemm=layout["grouped"],
        normalization=style.normalization,
    )
    model = GPTModel(
        config=config,
        transformer_layer_spec=spec,
        vocab_size=options.padded_vocab,
        max_sequence_length=options.seq,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
        share_embeddings_and_output_weights=style.tied,
        position_embedding_type=style.position_embedding_type,
        rotary_percent=style.rotary_percent,
        rotary_base=options.rotary_base,
        vp_stage=vp_stage,
    )
    return model.to(getattr(torch, options.dtype))


def fill(model: Any, vp_stage: int) -> None:
    """Random weights: the same on ranks that hold the same shard."""
    ranks = [parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_pipeline_model_parallel_rank()]
    for name, parameter in model.named_parameters():
        mine = [name, *ranks, vp_stage]
        if ".experts." in name:
            mine = [name, parallel_state.get_expert_tensor_parallel_rank(), ranks[1], vp_stage]
            mine.append(parallel_state.get_expert_model_parallel_rank())
        elif "word_embeddings" in name or name.startswith("output_layer"):
            mine = ["vocabulary", ranks[0]]  # tied copies are equal
        seed = int.from_bytes(hashlib.sha256(repr(mine).encode()).digest()[:6], "little")
        values = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)) * 0.1
        with torch.no_grad():
            parameter.copy_(values)


def arguments(options: argparse.Namespace, layout: dict[str, Any]) -> argparse.Namespace:
    """What Megatron-LM would save."""
    saved = make_checkpoint.training_arguments(options, megatron_on_cpu.STYLES[options.style])
    saved.virtual_pipeline_model_parallel_size = layout["vpp"] if layout["vpp"] > 1 else None
    saved.expert_model_parallel_size = layout["ep"]
    saved.expert_tensor_parallel_size = layout["etp"] or options.tp
    saved.ckpt_format = "torch"
    if layout["experts"]:
        saved.num_experts = layout["experts"]
        saved.moe_ffn_hidden_size = options.ffn
        saved.moe_router_pre_softmax = False
        saved.moe_router_score_function = "softmax"
    return saved


def save_legacy(models: list[Any], options: argparse.Namespace, layout: dict[str, Any]) -> None:
    """This rank's file, where it writes one (`save_checkpoint` of 0.10 to 0.17: the first of its expert replicas)."""
    if parallel_state.get_expert_data_parallel_rank():
        return
    name = f"mp_rank_{parallel_state.get_tensor_model_parallel_rank():02d}"
    if options.pp > 1:
        name += f"_{parallel_state.get_pipeline_model_parallel_rank():03d}"
    if layout["ep"] > 1:
        name += f"_{parallel_state.get_expert_model_parallel_rank():03d}"
    state: dict[str, Any] = {
        "args": arguments(options, layout),
        "checkpoint_version": 3.0,
        "iteration": ITERATION,
        "num_floating_point_operations_so_far": 0,
    }
    keys = ["model"] if len(models) == 1 else [f"model{number}" for number in range(len(models))]
    state |= {key: model.state_dict_for_save_checkpoint() for key, model in zip(keys, models, strict=True)}
    folder = options.out / "legacy" / f"iter_{ITERATION:07d}" / name
    folder.mkdir(parents=True)
    torch.save(state, folder / "model_optim_rng.pt")


def save_torch_dist(models: list[Any], options: argparse.Namespace, layout: dict[str, Any]) -> None:
    """The same as torch_dist. Called by every rank."""
    folder = options.out / "torch_dist" / f"iter_{ITERATION:07d}"
    folder.mkdir(parents=True, exist_ok=True)
    state: dict[str, Any] = {"args": arguments(options, layout), "checkpoint_version": 3.0, "iteration": ITERATION}
    keys = ["model"] if len(models) == 1 else [f"model{number}" for number in range(len(models))]
    metadata = {"non_homogeneous_layers": False, "singleton_local_shards": False, "dp_cp_group": None}
    metadata["dp_cp_group"] = parallel_state.get_data_parallel_group(with_context_parallel=True)
    state |= {key: model.sharded_state_dict(metadata=metadata) for key, model in zip(keys, models, strict=True)}
    dist_checkpointing.save(state, str(folder))


def run_rank(rank: int, world: int, rendezvous: str, out: Path, given: dict[str, Any]) -> None:
    """Build, fill and save this rank's part."""
    layout, options = layout_of(given), options_of(out, given)
    make_checkpoint.resolve(options, megatron_on_cpu.STYLES[options.style].heads_per_group)
    megatron_on_cpu.substitute_cuda()
    torch.distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world)
    parallel_state.initialize_model_parallel(
        options.tp,
        options.pp,
        layout["vpp"] if layout["vpp"] > 1 else None,
        expert_model_parallel_size=layout["ep"],
        expert_tensor_parallel_size=layout["etp"],
    )
    if layout["grouped"]:  # the kernels are only needed to compute
        from megatron.core.transformer.moe import experts

        experts.gg.assert_grouped_gemm_is_available = lambda: None
    models = []
    for stage in range(layout["vpp"]):
        parallel_state.set_virtual_pipeline_model_parallel_rank(stage if layout["vpp"] > 1 else None)
        models.append(build(options, layout, stage if layout["vpp"] > 1 else None))
        fill(models[-1], stage)
    save_legacy(models, options, layout)
    save_torch_dist(models, options, layout)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def main() -> None:
    """Fork the ranks of each model in turn."""
    out, models = Path(sys.argv[1]), json.loads(sys.argv[2])
    torch.set_num_threads(1)
    for name, given in models.items():
        world = given.get("world") or given.get("tp", 1) * given.get("pp", 1)
        with tempfile.TemporaryDirectory() as folder:
            start_processes(run_rank, (world, f"file://{folder}/r", out / name, given), world, start_method="fork")
        for kind in ("legacy", "torch_dist"):
            (out / name / kind / "latest_checkpointed_iteration.txt").write_text(str(ITERATION))


if __name__ == "__main__":
    main()
