"""Make a real, small Megatron checkpoint on a machine without a GPU.

A megatron-core GPTModel with random weights is built on the asked tp x pp layout and saved as `torch_dist`, the
folder layout of Megatron-LM's --save. The weights depend on the sizes and the seed only: the same model saved
with another tp, pp or key layout holds the same tensors (padded vocabulary rows aside).
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import tempfile
from pathlib import Path
from typing import Any

EXAMPLES = """\
examples:
  python launch/make_checkpoint.py /tmp/llama --tp 2 --pp 2
  torchrun --nproc-per-node 4 launch/make_checkpoint.py /tmp/llama --tp 2 --pp 2
  python launch/make_checkpoint.py /tmp/nemotron --style nemotron --tp 4 --kv-groups 4 --seed 3

Started by plain `python` it forks tp * pp processes of its own; under torchrun start tp * pp processes.
"""


def build_parser() -> argparse.ArgumentParser:
    """The command line. Sizes left out follow --hidden and --heads as in Megatron-LM."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="folder to save in, Megatron-LM's --save")
    _add_model_options(parser.add_argument_group("model"))
    _add_saving_options(parser.add_argument_group("saving"))
    return parser


def _add_model_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--style",
        choices=["llama", "gpt", "nemotron"],
        default="llama",
        help="llama: RMSNorm, SwiGLU, GQA, rope, untied; gpt: LayerNorm, biases, GELU, learned positions, tied; "
        "nemotron: zero-centred LayerNorm, squared ReLU, GQA, half rope, untied (default: llama)",
    )
    sizes = {
        "layers": (4, "transformer layers"),
        "hidden": (64, "hidden size"),
        "heads": (8, "attention heads"),
        "kv-groups": (None, "key-value groups (default: a quarter of the heads; gpt: the heads)"),
        "head-size": (None, "size of a head (default: hidden / heads)"),
        "ffn": (None, "size of the MLP (default: twice the hidden size)"),
        "vocab": (250, "true vocabulary size"),
        "vocab-divisor": (16, "the vocabulary is padded to a multiple of this times tp"),
        "seq": (64, "sequence length and number of positions"),
        "rotary-base": (10000, "base of the rotary embedding"),
    }
    for name, (default, text) in sizes.items():
        note = "" if default is None else f" (default: {default})"
        group.add_argument(f"--{name}", type=int, default=default, metavar="N", help=text + note)
    group.add_argument("--norm-epsilon", type=float, default=1e-5, metavar="X", help="norm epsilon (default: 1e-05)")
    group.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16", help="of the weights")
    group.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the weights (default: 0)")


def _add_saving_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--tp", type=int, default=1, metavar="N", help="tensor-parallel size (default: 1)")
    group.add_argument("--pp", type=int, default=1, metavar="N", help="pipeline-parallel size (default: 1)")
    group.add_argument("--iteration", type=int, default=10, metavar="N", help="training iteration (default: 10)")
    group.add_argument("--optimizer", action="store_true", help="also save Adam moments and fp32 weights")
    layout = group.add_mutually_exclusive_group()
    layout.add_argument("--per-layer", action="store_true", help="one key per layer instead of stacked layers")
    layout.add_argument("--singleton", action="store_true", help="one key per layer, and gate and up under two keys")
    group.add_argument(
        "--arg-generation",
        choices=["new", "old"],
        default="new",
        help="spelling of the saved arguments: of Megatron-LM 0.16 and later, or of 0.15 and before",
    )


def resolve(options: argparse.Namespace, heads_per_group: int) -> None:
    """Fill in the sizes that follow from others, in place; `padded_vocab` is added."""
    options.kv_groups = options.kv_groups or max(1, options.heads // heads_per_group)
    options.head_size = options.head_size or options.hidden // options.heads
    options.ffn = options.ffn or 2 * options.hidden
    multiple = options.vocab_divisor * options.tp
    options.padded_vocab = -(-options.vocab // multiple) * multiple


def start_processes(options: argparse.Namespace) -> None:
    """Run tp * pp ranks as forks of this process, which saves each of them the imports. Raises when one fails."""
    import megatron_on_cpu  # noqa: F401  imported before the fork
    import torch
    from megatron.core.models.gpt import GPTModel  # noqa: F401  imported before the fork
    from torch.multiprocessing.spawn import start_processes as fork

    num_processes = options.tp * options.pp
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        arguments = (num_processes, f"file://{folder}/rendezvous", options)
        fork(run_rank, arguments, num_processes, start_method="fork")  # type: ignore[no-untyped-call]


def training_arguments(options: argparse.Namespace, style: Any) -> argparse.Namespace:
    """The arguments Megatron-LM would have saved, as far as they describe the model and its layout.

    `vocab_size` is one less than the true size: that is how Megatron-LM's NullTokenizer is told it.
    """
    import torch
    from megatron.core.transformer.enums import AttnBackend

    new = options.arg_generation == "new"
    renamed = {
        "layernorm_epsilon" if new else "norm_epsilon": options.norm_epsilon,
        "layernorm_zero_centered_gamma" if new else "apply_layernorm_1p": style.zero_centered_gamma,
    }
    return argparse.Namespace(
        **renamed,
        **_model_arguments(options, style),
        **_layout_arguments(options),
        params_dtype=getattr(torch, options.dtype),
        bf16=options.dtype == "bfloat16",
        fp16=options.dtype == "float16",
        fp8=None,
        attention_backend=AttnBackend.auto,
        exit_signal=signal.SIGTERM,
    )


def _model_arguments(options: argparse.Namespace, style: Any) -> dict[str, Any]:
    return {
        "num_layers": options.layers,
        "encoder_num_layers": options.layers,
        "hidden_size": options.hidden,
        "ffn_hidden_size": options.ffn,
        "num_attention_heads": options.heads,
        "group_query_attention": options.kv_groups != options.heads,
        # Without grouped queries Megatron-LM leaves its default, which means nothing.
        "num_query_groups": options.kv_groups if options.kv_groups != options.heads else 1,
        "kv_channels": options.head_size,
        "seq_length": options.seq,
        "max_position_embeddings": options.seq,
        "position_embedding_type": style.position_embedding_type,
        "add_position_embedding": True,
        "use_rotary_position_embeddings": False,
        "rotary_base": options.rotary_base,
        "rotary_percent": style.rotary_percent,
        "rotary_interleaved": False,
        "rotary_seq_len_interpolation_factor": None,
        "use_rope_scaling": False,
        "rope_scaling_factor": 8.0,
        "rope_type": None,
        "normalization": style.normalization,
        "swiglu": style.swiglu,
        "squared_relu": style.activation == "squared_relu",
        "openai_gelu": False,
        "onnx_safe": None,
        "quick_geglu": False,
        "glu_linear_offset": 0.0,
        "activation_func_clamp_value": None,
        "bias_gelu_fusion": False,
        "bias_swiglu_fusion": False,
        "add_bias_linear": style.bias,
        "add_qkv_bias": False,
        "untie_embeddings_and_output_weights": not style.tied,
        "tokenizer_type": "NullTokenizer",
        "tokenizer_model": None,
        "vocab_file": None,
        "merge_file": None,
        "vocab_size": options.vocab - 1,
        "padded_vocab_size": options.padded_vocab,
        "make_vocab_size_divisible_by": options.vocab_divisor,
        "qk_layernorm": False,
        "qk_l2_norm": False,
        "apply_query_key_layer_scaling": False,
        "apply_residual_connection_post_layernorm": False,
        "attention_softmax_in_fp32": False,
        "softmax_type": "vanilla",
        "window_size": None,
        "num_experts": None,
        "moe_router_topk": 2,
        "moe_layer_freq": 1,
        "multi_latent_attention": False,
        "q_lora_rank": None,
        "kv_lora_rank": 32,
        "mtp_num_layers": None,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    }


def _layout_arguments(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "world_size": options.tp * options.pp,
        "tensor_model_parallel_size": options.tp,
        "pipeline_model_parallel_size": options.pp,
        "virtual_pipeline_model_parallel_size": None,
        "num_layers_per_virtual_pipeline_stage": None,
        "decoder_first_pipeline_num_layers": None,
        "decoder_last_pipeline_num_layers": None,
        "account_for_embedding_in_pipeline_split": False,
        "account_for_loss_in_pipeline_split": False,
        "pipeline_model_parallel_layout": None,
        "context_parallel_size": 1,
        "expert_model_parallel_size": 1,
        "expert_tensor_parallel_size": options.tp,
        "data_parallel_size": 1,
        "sequence_parallel": False,
        "transformer_impl": "local",
        "spec": None,
        "ckpt_format": "torch_dist",
        "use_legacy_models": False,
        "use_distributed_optimizer": False,
        "optimizer": "adam",
        "iteration": options.iteration,
        "train_iters": options.iteration,
        "seed": options.seed,
    }


def optimizer_state(model: Any, metadata: dict[str, Any]) -> dict[str, Any]:
    """One AdamW step on fp32 copies of the weights, as sharded state under Megatron's optimizer keys."""
    import torch
    from megatron.core.dist_checkpointing import optimizer as sharding

    parameters = list(model.parameters())
    masters = [p.detach().float().clone().requires_grad_() for p in parameters]
    for master in masters:
        master.grad = master.detach() * 0.5  # element by element, so that the layout does not matter
    adam = torch.optim.AdamW(masters, lr=1e-4, foreach=False)
    adam.step()
    state: dict[str, Any] = adam.state_dict()
    to_shard = sharding.get_param_id_to_sharded_param_map(model.sharded_state_dict(metadata=metadata), parameters)
    sharding.optim_state_to_sharding_state(state, to_shard, exclude_keys=("step",))
    fp32 = [
        sharding.make_sharded_optimizer_tensor(to_shard[i], master.detach(), "optimizer.state.fp32_param")
        for i, master in enumerate(masters)
    ]
    return {"optimizer": state, "fp32_from_fp16_params": [fp32]}


def fill_model(model: Any, options: argparse.Namespace, metadata: dict[str, Any]) -> None:
    """Give the model's parameters their portable random values."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
    from megatron_on_cpu import STYLES
    from portable_weights import fill

    shards = model.sharded_state_dict(metadata=metadata)
    apply_factories(shards)
    tensors = [value for value in nested_values(shards) if isinstance(value, ShardedTensor)]
    zero_centered_gamma = STYLES[options.style].zero_centered_gamma
    fill(tensors, seed=options.seed, vocab=options.vocab, zero_centered_gamma=zero_centered_gamma)


def save(model: Any, options: argparse.Namespace, metadata: dict[str, Any]) -> None:
    """Write the iteration folder, then the tracker file. Called by every rank."""
    import torch
    from megatron.core import dist_checkpointing
    from megatron_on_cpu import STYLES

    folder = options.out / f"iter_{options.iteration:07d}"
    state: dict[str, Any] = {
        "args": training_arguments(options, STYLES[options.style]),
        "checkpoint_version": 3.0,
        "iteration": options.iteration,
        "num_floating_point_operations_so_far": 0,
        "model": model.sharded_state_dict(metadata=metadata),
    }
    if options.optimizer:
        state["optimizer"] = optimizer_state(model, metadata)
    folder.mkdir(parents=True, exist_ok=True)
    dist_checkpointing.save(state, str(folder), content_metadata=metadata)
    if torch.distributed.get_rank() == 0:
        (options.out / "latest_checkpointed_iteration.txt").write_text(str(options.iteration))
        print(f"saved {folder}")


def run_rank(rank: int, num_processes: int, rendezvous: str, options: argparse.Namespace) -> None:
    """What every rank does, however it was started: build, fill, save."""
    import megatron_on_cpu
    import torch

    style = megatron_on_cpu.STYLES[options.style]
    resolve(options, style.heads_per_group)
    megatron_on_cpu.substitute_cuda()
    torch.distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=num_processes)
    megatron_on_cpu.start_model_parallel(tp=options.tp, pp=options.pp)
    model = megatron_on_cpu.build_gpt(options, style)
    metadata = {
        "non_homogeneous_layers": options.per_layer or options.singleton,
        "singleton_local_shards": options.singleton,
    }
    fill_model(model, options, metadata)
    save(model, options, metadata)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def main() -> None:
    """Check what is installed, then be a rank of torchrun's or start the ranks."""
    parser = build_parser()
    options = parser.parse_args()
    # Without psutil megatron-core's writer hangs instead of failing.
    if missing := [name for name in ("torch", "megatron.core", "psutil") if not _is_installed(name)]:
        parser.error(f"not installed: {', '.join(missing)}; run: pip install torch megatron-core psutil")
    if "RANK" in os.environ:
        run_rank(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), "env://", options)
    else:
        start_processes(options)


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # of a parent package
        return False


if __name__ == "__main__":
    main()
