"""Make small real checkpoints of model families that launch/make_checkpoint.py does not know.

    python tests/support/family_models.py starcoder2 OUT [--tp 2]

A megatron-core GPTModel is built from the family's arguments on tp ranks of this machine's CPU, filled with the weights
of launch/portable_weights.py and saved as `torch_dist`, with the configuration that the family's trainer keeps
beside it. The checkpoints in tests/conformance/checkpoints were made so.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS.parent / "launch"), str(TESTS.parent), str(TESTS)]

import megatron_on_cpu  # noqa: E402
import portable_weights  # noqa: E402
import torch  # noqa: E402
import yaml  # noqa: E402

from support.small_models import model_config  # noqa: E402

VOCAB = 122
"""True vocabulary size: not a multiple of 4, so that tables need padding rows at tp 4."""
SIZES = {"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 64, "num_attention_heads": 8}


@dataclass(frozen=True)
class Family:
    """What makes a small model of a family: parameters of TransformerConfig and of GPTModel."""

    config: dict[str, Any]
    model: dict[str, Any]
    zero_centered: bool = False
    beyond: dict[str, Any] = field(default_factory=dict)
    """Fields of `ModelConfig` for what Megatron-Core alone does not have."""
    trainer: dict[str, Any] = field(default_factory=dict)
    """What the configuration of a trainer other than Megatron-LM says of it."""
    vocab: int = VOCAB


_GPT_BIASES = {"add_bias_linear": True, "normalization": "LayerNorm", "layernorm_epsilon": 1e-5}
_GEMMA = {"normalization": "RMSNorm", "layernorm_epsilon": 1e-6, "add_bias_linear": False, "kv_channels": 8}
_GEMMA |= {"gated_linear_unit": True, "gelu": "tanh"}
_FALCON = {"normalization": "LayerNorm", "layernorm_epsilon": 1e-5, "add_bias_linear": False, "kv_channels": 4}

FAMILIES = {
    "starcoder2": Family(
        {**_GPT_BIASES, "num_query_groups": 2, "kv_channels": 4, "gelu": "tanh", "window_size": (15, 0)},
        {"position_embedding_type": "rope", "rotary_base": 100000, "tied": False},
    ),
    "starcoder": Family(
        {**_GPT_BIASES, "num_query_groups": 1, "kv_channels": 4, "gelu": "tanh"},
        {"position_embedding_type": "learned_absolute", "rotary_base": 10000, "tied": True},
    ),
    "gemma": Family(
        {**_GEMMA, "num_query_groups": 1},
        {"position_embedding_type": "rope", "rotary_base": 10000, "tied": True},
        zero_centered=True,
        vocab=124,
        trainer={"_target_": "megatron.bridge.models.gemma.gemma_provider.GemmaModelProvider"},
    ),
    "gemma2": Family(
        {**_GEMMA, "num_query_groups": 4},
        {"position_embedding_type": "rope", "rotary_base": 10000, "tied": True},
        zero_centered=True,
        vocab=124,
        beyond={"post_norms": True},
        trainer={
            "_target_": "megatron.bridge.models.gemma.gemma2_provider.Gemma2ModelProvider",
            "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
            "window_size": [7, 0],
        },
    ),
    "falcon_7b": Family(
        {**_FALCON, "num_query_groups": 1},
        {"position_embedding_type": "rope", "rotary_base": 10000, "tied": True},
        beyond={"parallel_attention": True, "separate_mlp_norm": False},
        trainer={"parallel_attention": True, "new_decoder_architecture": False},
        vocab=128,
    ),
    "falcon_40b": Family(
        {**_FALCON, "num_query_groups": 2},
        {"position_embedding_type": "rope", "rotary_base": 10000, "tied": True},
        beyond={"parallel_attention": True},
        trainer={"parallel_attention": True, "new_decoder_architecture": True},
        vocab=128,
    ),
}


def padded_vocab(family: Family, tp: int) -> int:
    """Rows of the embedding: Megatron-LM's padding to a multiple of 16 x tp."""
    return -(-family.vocab // (16 * tp)) * 16 * tp


def build(family: Family, *, tp: int, dtype: torch.dtype) -> Any:
    """This rank's GPTModel with unset weights."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer import TransformerConfig

    from dist_export.verify.megatron_modules import layer_spec

    described = model_config(normalization=family.config["normalization"], **family.beyond)
    fields = {name: value for name, value in family.config.items() if name not in ("gelu", "window_size")}
    config = TransformerConfig(
        **SIZES,
        **fields,
        activation_func=torch.nn.functional.gelu,
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
        transformer_layer_spec=layer_spec(described),
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
    )


def bridge_config(family: Family, tp: int) -> dict[str, Any]:
    """``model`` of Megatron-Bridge's run_config.yaml (models/gemma/gemma_provider.py, gemma2_provider.py)."""
    fields = {name: value for name, value in family.config.items() if name != "gelu"}
    return {
        **SIZES,
        **fields,
        "activation_func": {"_target_": "megatron.core.activations.fast_gelu", "_call_": False},
        "layernorm_zero_centered_gamma": family.zero_centered,
        "add_qkv_bias": False,
        "bias_activation_fusion": False,
        "position_embedding_type": family.model["position_embedding_type"],
        "rotary_base": family.model["rotary_base"],
        "rotary_percent": 1.0,
        "seq_length": 32,
        "share_embeddings_and_output_weights": family.model["tied"],
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": 1,
        "make_vocab_size_divisible_by": 16,
        "should_pad_vocab": True,
        "vocab_size": family.vocab,
        "num_moe_experts": None,
        "rope_scaling": False,
        **family.trainer,
    }


def nemo_config(family: Family, tp: int) -> dict[str, Any]:
    """model_config.yaml of NeMo 1's Falcon (examples/nlp/language_modeling/conf/megatron_falcon_config.yaml)."""
    names = ("layernorm_epsilon", "num_query_groups", "kv_channels")
    return {
        "mcore_gpt": True,
        "name": "megatron_falcon_gpt",
        "encoder_seq_length": 32,
        "max_position_embeddings": "${.encoder_seq_length}",
        **SIZES,
        **{name: family.config[name] for name in names},
        "normalization": "layernorm",
        "activation": "gelu",
        "bias": False,
        "bias_activation_fusion": False,
        "position_embedding_type": "rope",
        "rotary_percentage": 1.0,
        "share_embeddings_and_output_weights": family.model["tied"],
        "transformer_block_type": "pre_ln",
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": 1,
        "tokenizer": {"library": "huggingface", "type": "tiiuae/falcon-7b"},
        "precision": "bf16",
        "mcore_customization_config": family.trainer,
    }


def save(model: Any, name: str, out: Path, tp: int) -> None:
    """Write the folder as the family's trainer does. Called by every rank."""
    from megatron.core import dist_checkpointing, parallel_state

    family, nemo = FAMILIES[name], name.startswith("falcon")
    folder = out / ("model_weights" if nemo else "iter_0000010")
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    weights = model.sharded_state_dict(prefix="model." if nemo else "", metadata=metadata)
    state: dict[str, Any] = weights if nemo else {"model": weights, "checkpoint_version": 3.0, "iteration": 10}
    if not family.trainer:
        state["args"] = training_arguments(family, tp)
    dist_checkpointing.save(state, str(folder))
    if torch.distributed.get_rank():
        return
    if nemo:
        (out / "model_config.yaml").write_text(yaml.safe_dump(nemo_config(family, tp)))
        return
    (out / "latest_checkpointed_iteration.txt").write_text("10")
    if family.trainer:
        (folder / "run_config.yaml").write_text(yaml.safe_dump({"model": bridge_config(family, tp)}))


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
    megatron_on_cpu.hide_gpus()
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
