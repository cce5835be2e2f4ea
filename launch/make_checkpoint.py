"""Make a real, small Megatron checkpoint on a machine without a GPU.

A megatron-core GPTModel with random weights is built on the asked training layout and saved in the folder layout of
Megatron-LM's --save, as `torch_dist` or as legacy rank files. The weights depend on the sizes and the seed only: the
same model saved with another layout, key layout or format holds the same tensors (padded vocabulary rows aside).
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import tempfile
from pathlib import Path

EXAMPLES = """\
examples:
  python launch/make_checkpoint.py /tmp/llama --tp 2 --pp 2
  torchrun --nproc-per-node 4 launch/make_checkpoint.py /tmp/llama --tp 2 --pp 2
  python launch/make_checkpoint.py /tmp/nemotron --style nemotron --tp 4 --kv-groups 4 --seed 3
  python launch/make_checkpoint.py /tmp/mixtral --style mixtral --tp 2 --ep 2 --etp 1 --pp 2 --vpp 2 --format legacy

Started by plain `python` it forks the processes that the layout needs; under torchrun start as many, or a multiple:
pp times the least common multiple of tp and ep times etp.
"""


def build_parser() -> argparse.ArgumentParser:
    """The command line. Sizes left out follow --hidden and --heads as in Megatron-LM."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="folder to save in, Megatron-LM's --save")
    _add_model_options(parser.add_argument_group("model"))
    _add_expert_options(parser.add_argument_group("experts"))
    _add_layout_options(parser.add_argument_group("training layout"))
    _add_saving_options(parser.add_argument_group("saving"))
    return parser


def _add_model_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--style",
        choices=["llama", "gpt", "nemotron", "mixtral"],
        default="llama",
        help="llama: RMSNorm, SwiGLU, GQA, rope, untied; gpt: LayerNorm, biases, GELU, learned positions, tied; "
        "nemotron: zero-centred LayerNorm, squared ReLU, GQA, half rope, untied; mixtral: llama with experts "
        "(default: llama)",
    )
    sizes = {
        "layers": (4, "transformer layers"),
        "mtp-layers": (None, "layers that predict further tokens (default: none)"),
        "hidden": (64, "hidden size"),
        "heads": (8, "attention heads"),
        "kv-groups": (None, "key-value groups (default: a quarter of the heads; gpt: the heads)"),
        "head-size": (None, "size of a head (default: hidden / heads)"),
        "kv-lora-rank": (None, "rank of keys and values: makes the attention a multi-latent one (default: none)"),
        "q-lora-rank": (None, "rank of queries in multi-latent attention (default: none)"),
        "rope-head-size": (None, "size of a multi-latent head's rotary part (default: half of the head size)"),
        "ffn": (None, "size of the MLP (default: twice the hidden size)"),
        "vocab": (250, "true vocabulary size"),
        "vocab-divisor": (16, "the vocabulary is padded to a multiple of this times tp"),
        "seq": (64, "sequence length and number of positions"),
        "rotary-base": (10000, "base of the rotary embedding"),
    }
    for name, (default, text) in sizes.items():
        note = "" if default is None else f" (default: {default})"
        group.add_argument(f"--{name}", type=int, default=default, metavar="N", help=text + note)
    group.add_argument("--qkv-bias", action="store_true", help="give query, key and value biases, also without others")
    group.add_argument("--qk-norm", action="store_true", help="give queries and keys norms")
    group.add_argument("--norm-epsilon", type=float, default=1e-5, metavar="X", help="norm epsilon (default: 1e-05)")
    group.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16", help="of the weights")
    group.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the weights (default: 0)")


def _add_expert_options(group: argparse._ArgumentGroup) -> None:
    sizes = {
        "experts": (None, "experts of a layer, 0 for none (default: 4 with mixtral, 0 otherwise)"),
        "top-k": (2, "experts that a token goes to (default: 2)"),
        "moe-ffn": (None, "size of an expert (default: --ffn)"),
        "shared-expert-ffn": (None, "size of the expert that every token goes to (default: none)"),
    }
    for name, (default, text) in sizes.items():
        group.add_argument(f"--{name}", type=int, default=default, metavar="N", help=text)
    group.add_argument("--shared-expert-gate", action="store_true", help="give the shared expert a gate")
    group.add_argument(
        "--grouped",
        action="store_true",
        help="experts as GroupedMLP keeps them, in two transposed matrices (default: SequentialMLP, one by one)",
    )
    group.add_argument(
        "--moe-layers",
        type=_pattern,
        metavar="PATTERN",
        help="a digit per layer, 1 with experts and 0 without, such as 0111 (default: experts in all)",
    )


def _pattern(text: str) -> list[int]:
    if not text or set(text) - set("01"):
        raise argparse.ArgumentTypeError(f"{text!r} is not of digits 0 and 1")
    return [int(digit) for digit in text]


def _add_layout_options(group: argparse._ArgumentGroup) -> None:
    sizes = {
        "tp": (1, "tensor-parallel size (default: 1)"),
        "pp": (1, "pipeline-parallel size (default: 1)"),
        "vpp": (1, "virtual pipeline stages per rank (default: 1)"),
        "ep": (1, "expert-parallel size (default: 1)"),
        "etp": (None, "tensor-parallel size of the experts (default: tp)"),
        "first-stage-layers": (None, "layers of the first pipeline stage (default: evenly spread)"),
        "last-stage-layers": (None, "layers of the last pipeline stage (default: evenly spread)"),
    }
    for name, (default, text) in sizes.items():
        group.add_argument(f"--{name}", type=int, default=default, metavar="N", help=text)
    group.add_argument(
        "--pipeline-layout",
        metavar="LAYOUT",
        help="layers of every virtual stage as Megatron-LM's --pipeline-model-parallel-layout, such as Et|tttL",
    )


def _add_saving_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--format",
        choices=["torch_dist", "legacy"],
        default="torch_dist",
        help="torch_dist, or legacy: a file per rank as --ckpt-format torch writes it (default: torch_dist)",
    )
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


def resolve(options: argparse.Namespace) -> None:
    """Fill in the sizes that follow from others, in place; `padded_vocab` is added."""
    from megatron_on_cpu import STYLES

    style = STYLES[options.style]
    options.kv_groups = options.kv_groups or max(1, options.heads // style.heads_per_group)
    options.head_size = options.head_size or options.hidden // options.heads
    options.rope_head_size = options.rope_head_size or options.head_size // 2
    options.ffn = options.ffn or 2 * options.hidden
    options.experts = style.num_experts if options.experts is None else options.experts
    if options.experts:
        options.moe_ffn = options.moe_ffn or options.ffn
    options.etp = options.etp or options.tp
    multiple = options.vocab_divisor * options.tp
    options.padded_vocab = -(-options.vocab // multiple) * multiple


def start_processes(options: argparse.Namespace) -> None:
    """Run the ranks as forks of this process, which saves each of them the imports. Raises when one fails.

    `options` are resolved.
    """
    import megatron_on_cpu

    megatron_on_cpu.hide_gpus()
    import torch
    from megatron.core.models.gpt import GPTModel  # noqa: F401  imported before the fork
    from torch.multiprocessing.spawn import start_processes as fork

    num_processes = megatron_on_cpu.num_ranks(options)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        arguments = (num_processes, f"file://{folder}/rendezvous", options)
        fork(run_rank, arguments, num_processes, start_method="fork")  # type: ignore[no-untyped-call]


def run_rank(rank: int, num_processes: int, rendezvous: str, options: argparse.Namespace) -> None:
    """What every rank does, however it was started: build, fill, save. `options` are resolved."""
    import megatron_on_cpu
    import portable_weights
    import save_formats
    import torch

    style = megatron_on_cpu.STYLES[options.style]
    megatron_on_cpu.substitute_cuda()
    torch.distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=num_processes)
    megatron_on_cpu.start_model_parallel(options)
    chunks = megatron_on_cpu.build_chunks(options, style)
    portable_weights.fill_chunks(
        chunks, seed=options.seed, vocab=options.vocab, zero_centered_gamma=style.zero_centered_gamma
    )
    save_formats.save(chunks, options)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def main() -> None:
    """Check what is installed, then be a rank of torchrun's or start the ranks."""
    import megatron_on_cpu

    megatron_on_cpu.hide_gpus()
    parser = build_parser()
    options = parser.parse_args()
    # Without psutil megatron-core's writer hangs instead of failing.
    if missing := [name for name in ("torch", "megatron.core", "psutil") if not _is_installed(name)]:
        parser.error(f"not installed: {', '.join(missing)}; run: pip install torch megatron-core psutil")
    resolve(options)
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
