"""Make small real checkpoints of model families that launch/make_checkpoint.py does not know.

    python tests/support/family_models.py starcoder2 OUT [--tp 2]

A megatron-core GPTModel is built from the family's arguments on tp ranks of this machine's CPU, filled with the portable
weights of launch/portable_weights.py and saved as `torch_dist`, with the configuration that the family's trainer keeps
beside it. The checkpoints in tests/conformance/checkpoints were made so.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[2] / "launch"), str(Path(__file__).parents[2])]

import megatron_on_cpu  # noqa: E402  first of all, because it hides the GPUs

import portable_weights  # noqa: E402
import torch  # noqa: E402

VOCAB = 122
"""True vocabulary size: not a multiple of 4, so that tables need padding rows at tp 4."""
SIZES = {"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 64, "num_attention_heads": 8}


@dataclass(frozen=True)
class Family:
    """What makes a small model of a family: parameters of TransformerConfig and of GPTModel."""

    config: dict[str, Any]
    model: dict[str, Any]
    zero_centered: bool = False
    args: dict[str, Any] = field(default_factory=dict)
    """Megatron-LM's arguments; names are those of TransformerConfig unless they are here."""
    vocab: int = VOCAB


_GPT_BIASES = {"add_bias_linear": True, "normalization": "LayerNorm", "layernorm_epsilon": 1e-5}

FAMILIES = {
    "starcoder2": Family(
        {**_GPT_BIASES, "num_query_groups": 2, "kv_channels": 4, "gelu": "tanh", "window_size": (15, 0)},
        {"position_embedding_type": "rope", "rotary_base": 100000, "tied": False},
    ),
    "starcoder": Family(
        {**_GPT_BIASES, "num_query_groups": 1, "kv_channels": 4, "gelu": "tanh"},
        {"position_embedding_type": "learned_absolute", "rotary_base": 10000, "tied": True},
    ),
}


def padded_vocab(family: Family, tp: int) -> int:
    """Rows of the embedding: Megatron-LM's padding to a multiple of 16 x tp."""
    return -(-family.vocab // (16 * tp)) * 16 * tp


def build(family: Family, *, tp: int, dtype: torch.dtype) -> Any:
    """This rank's GPTModel with unset weights."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    fields = {name: value for name, value in family.config.items() if name not in ("gelu", "window_size")}
    config = TransformerConfig(
        **SIZES,
        **fields,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        tensor_model_parallel_size=tp,
        use_cpu_initialization=True,
        perform_initialization=False,
        transformer_impl="local",
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
    )
    model = GPTModel(
        config=config,
        transformer_layer_spec=get_gpt_layer_local_spec(normalization=config.normalization),
        vocab_size=padded_vocab(family, tp),
        max_sequence_length=32,
        share_embeddings_and_output_weights=family.model["tied"],
        position_embedding_type=family.model["position_embedding_type"],
        rotary_base=family.model["rotary_base"],
    )
    return model.to(dtype)


def training_arguments(family: Family, tp: int) -> argparse.Namespace:
    """Megatron-LM's arguments, as far as they describe the model."""
    groups, heads = family.config["num_query_groups"], SIZES["num_attention_heads"]
    return argparse.Namespace(
        **SIZES,
        kv_channels=family.config["kv_channels"],
        group_query_attention=groups != heads,
        num_query_groups=groups,
        normalization=family.config["normalization"],
        layernorm_epsilon=family.config["layernorm_epsilon"],
        layernorm_zero_centered_gamma=family.zero_centered,
        add_bias_linear=family.config["add_bias_linear"],
        add_qkv_bias=False,
        swiglu=False,
        squared_relu=False,
        bias_gelu_fusion=family.config["gelu"] == "tanh",
        use_legacy_models=False,
        window_size=family.config.get("window_size"),
        position_embedding_type=family.model["position_embedding_type"],
        rotary_base=family.model["rotary_base"],
        rotary_percent=1.0,
        use_rope_scaling=False,
        max_position_embeddings=32,
        untie_embeddings_and_output_weights=not family.model["tied"],
        tokenizer_type="NullTokenizer",
        vocab_size=family.vocab - 1,  # how the NullTokenizer is told it
        padded_vocab_size=padded_vocab(family, tp),
        make_vocab_size_divisible_by=16,
        num_experts=None,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=1,
        params_dtype=torch.bfloat16,
        bf16=True,
        **family.args,
    )


def save(model: Any, name: str, out: Path, tp: int) -> None:
    """Write the folder. Called by every rank."""
    from megatron.core import dist_checkpointing, parallel_state

    folder = out / "iter_0000010"
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    state = {"args": training_arguments(FAMILIES[name], tp), "checkpoint_version": 3.0, "iteration": 10}
    state["model"] = model.sharded_state_dict(metadata=metadata)
    dist_checkpointing.save(state, str(folder))
    if torch.distributed.get_rank() == 0:
        (out / "latest_checkpointed_iteration.txt").write_text("10")


def run_rank(rank: int, name: str, out: Path, tp: int, rendezvous: str) -> None:
    """What every rank does: build, fill, save."""
    family = FAMILIES[name]
    megatron_on_cpu.substitute_cuda()
    torch.distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=tp)
    layout = argparse.Namespace(tp=tp, pp=1, vpp=1, ep=1, etp=tp)
    megatron_on_cpu.start_model_parallel(layout)
    model = build(family, tp=tp, dtype=torch.bfloat16)
    portable_weights.fill_chunks([model], seed=7, vocab=family.vocab, zero_centered_gamma=family.zero_centered)
    save(model, name, out, tp)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def main() -> None:
    """Fork the ranks."""
    from megatron.core.models.gpt import GPTModel  # noqa: F401  imported before the fork
    from torch.multiprocessing.spawn import start_processes

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", choices=FAMILIES)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tp", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        arguments = (options.family, options.out, options.tp, f"file://{folder}/rendezvous")
        start_processes(run_rank, arguments, options.tp, start_method="fork")  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    main()
