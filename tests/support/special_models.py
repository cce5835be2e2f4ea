"""Real Megatron-Core models of the families that launch/make_checkpoint.py does not build, saved and run on a CPU.

    torchrun --nproc-per-node 2 tests/support/special_models.py deepseek_v3 FOLDER --tp 2
    python tests/support/special_models.py deepseek_v3 FOLDER --logits LOGITS.safetensors

The weights depend on the names and the seed alone. With --logits nothing is saved but token ids and the fp32 logits
that Megatron's own model computes from the weights rounded to bfloat16. The checkpoints of these names in
tests/conformance/checkpoints were made with it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "launch"))

import megatron_on_cpu
import torch
from portable_weights import fill_chunks

VOCAB, PADDED, LENGTH = 120, 128, 64


@dataclass(frozen=True)
class Model:
    """A model: fields of Megatron-Core's configuration, of GPTModel, and Megatron-LM's arguments that say the same."""

    config: dict[str, Any]
    gpt: dict[str, Any] = field(default_factory=dict)
    args: dict[str, Any] = field(default_factory=dict)
    kind: str = "TransformerConfig"


_LATENT = {
    "multi_latent_attention": True,
    "q_lora_rank": 16,
    "kv_lora_rank": 12,
    "qk_head_dim": 8,
    "qk_pos_emb_head_dim": 4,
    "v_head_dim": 6,
    "rotary_scaling_factor": 40.0,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
}
_DEEPSEEK = {
    "num_layers": 2,
    "hidden_size": 32,
    "ffn_hidden_size": 48,
    "num_attention_heads": 4,
    "num_moe_experts": 4,
    "moe_ffn_hidden_size": 16,
    "moe_shared_expert_intermediate_size": 32,
    "moe_layer_freq": [0, 1],
    "qk_layernorm": True,
    "layernorm_epsilon": 1e-6,
    **_LATENT,
}
_SIGMOID = {
    "moe_router_topk": 2,
    "moe_router_num_groups": 2,
    "moe_router_group_topk": 1,
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "moe_router_topk_scaling_factor": 2.5,
    "moe_router_pre_softmax": True,
}
_GROUPS = {
    "num_moe_experts": 8,
    "moe_router_topk": 2,
    "moe_router_num_groups": 4,
    "moe_router_group_topk": 2,
    "moe_router_topk_scaling_factor": 2.5,
    "moe_router_pre_softmax": True,
}
_MLA_ARGS = {"rope_type": None, "position_embedding_type": "rope"}

MODELS = {
    "deepseek_v3": Model({**_DEEPSEEK, **_SIGMOID, "mtp_num_layers": 1}, args=_MLA_ARGS, kind="MLATransformerConfig"),
    "moonlight": Model(
        {**_DEEPSEEK, **_SIGMOID, "q_lora_rank": None, "rotary_scaling_factor": 1.0, "rope_type": "rope"}
        | {"moe_router_num_groups": None, "moe_router_group_topk": None, "mscale_all_dim": 0.0, "mscale": 1.0},
        args={"position_embedding_type": "rope"},
        kind="MLATransformerConfig",
    ),
    "deepseek_v2": Model(
        {**_DEEPSEEK, "q_lora_rank": None, "rotary_scaling_factor": 1.0, "rope_type": "rope"}
        | {"mscale_all_dim": 0.0, "mscale": 1.0, "moe_router_topk": 2, "moe_router_pre_softmax": True},
        args={"position_embedding_type": "rope"},
        kind="MLATransformerConfig",
    ),
    # What TensorRT-LLM's class serves has values as large as unrotated keys: V2 with groups of experts, and V2-Lite.
    "deepseek_v2_groups": Model(
        {**_DEEPSEEK, **_GROUPS, "v_head_dim": 8},
        args=_MLA_ARGS,
        kind="MLATransformerConfig",
    ),
    "deepseek_v2_lite": Model(
        {**_DEEPSEEK, "q_lora_rank": None, "v_head_dim": 8, "moe_router_topk": 2, "moe_router_pre_softmax": True},
        args=_MLA_ARGS,
        kind="MLATransformerConfig",
    ),
}

_BLOCKS = [
    {"attention": {"n_heads_in_group": 2}, "ffn": {"ffn_mult": 12.0}},
    {"attention": {"n_heads_in_group": None, "no_op": True}, "ffn": {"ffn_mult": 24.0}},
    {"attention": {"n_heads_in_group": 4}, "ffn": {"ffn_mult": None, "no_op": True}},
    {"attention": {"n_heads_in_group": None, "replace_with_linear": True}, "ffn": {"replace_with_linear": True}},
]
for _block in _BLOCKS:
    for _part in _block.values():
        _part |= {name: bool(_part.get(name)) for name in ("no_op", "replace_with_linear")}
    _block["ffn"].setdefault("ffn_mult", None)
MODELS["decilm"] = Model(
    {
        "num_layers": 4,
        "hidden_size": 32,
        "ffn_hidden_size": 256,
        "num_attention_heads": 8,
        "num_query_groups": 4,
        "kv_channels": 4,
        "layernorm_epsilon": 1e-5,
        "heterogeneous_layers_config_encoded_json": json.dumps({"block_configs": _BLOCKS}),
    },
    gpt={"rope_scaling": True, "rope_scaling_factor": 8.0, "rotary_base": 500000},
    args={
        "group_query_attention": True,
        "num_query_groups": 4,
        "use_rope_scaling": True,
        "rope_scaling_factor": 8.0,
        "rotary_base": 500000,
        "position_embedding_type": "rope",
        "heterogeneous_layers_config_path": "/training/blocks.json",
    },
    kind="heterogeneous",
)

_YARN = {"factor": 32.0, "original_max_position_embeddings": 32, "beta_fast": 32.0, "beta_slow": 1.0}
MODELS["gpt_oss"] = Model(
    {
        "num_layers": 2,
        "hidden_size": 32,
        "ffn_hidden_size": 24,
        "moe_ffn_hidden_size": 24,
        "num_attention_heads": 8,
        "num_query_groups": 2,
        "kv_channels": 8,
        "num_moe_experts": 4,
        "moe_router_topk": 2,
        "softmax_type": "learnable",
        "window_size": (7, 0),
        "window_attn_skip_freq": 2,
        "add_bias_linear": True,
        "add_qkv_bias": True,
        "glu_linear_offset": 1.0,
        "activation_func_clamp_value": 7.0,
    },
    gpt={"rotary_base": 150000},
    args={
        "group_query_attention": True,
        "num_query_groups": 2,
        "position_embedding_type": "yarn",
        "rotary_base": 150000,
        "swiglu": False,
        "quick_geglu": True,
        "rotary_scaling_factor": 32.0,
        "mscale": 1.0,
        "mscale_all_dim": 0.0,
        **{f"yarn_{name}": value for name, value in _YARN.items() if name != "factor"},
        "yarn_correction_range_round_to_int": False,
    },
)


def options_of(arguments: argparse.Namespace) -> argparse.Namespace:
    """What megatron_on_cpu wants to know of the layout."""
    return argparse.Namespace(tp=arguments.tp, pp=arguments.pp, ep=1, etp=arguments.tp, vpp=1)


def substitute_for_latent_attention() -> None:
    """What Megatron-Core 0.16's latent attention needs without TransformerEngine."""
    from megatron.core.transformer import dot_product_attention
    from megatron.core.transformer import multi_latent_attention as latent
    from megatron.core.transformer.moe import moe_utils

    for name in ("TELinear", "TEColumnParallelLinear", "Linear"):
        if not isinstance(getattr(latent, name, None), type):
            setattr(latent, name, type(name, (), {}))
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None
    plain = dot_product_attention.DotProductAttention.__init__

    def with_value_size(self: Any, *args: Any, k_channels: int = 0, v_channels: int = 0, **kw: Any) -> None:
        plain(self, *args, **kw)
        if v_channels:
            self.hidden_size_per_partition = v_channels * self.num_attention_heads_per_partition

    dot_product_attention.DotProductAttention.__init__ = with_value_size


def substitute_for_windows() -> None:
    """The mask of an attention window is made on the GPU."""
    from megatron.core.fusions import fused_softmax

    original, ones = fused_softmax.get_sliding_window_causal_mask, torch.ones

    def on_cpu(*args: Any, **kw: Any) -> torch.Tensor:
        torch.ones = lambda *sizes, device=None, **kw: ones(*sizes, **kw)  # type: ignore[assignment]
        try:
            return original.__wrapped__(*args, **kw) if hasattr(original, "__wrapped__") else original(*args, **kw)
        finally:
            torch.ones = ones

    fused_softmax.get_sliding_window_causal_mask = on_cpu


def build(model: Model, dtype: torch.dtype, layout: argparse.Namespace) -> Any:
    """One rank's GPTModel with unset weights."""
    from megatron.core import parallel_state, transformer
    from megatron.core.activations import quick_gelu
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_mtp_block_spec
    from megatron.core.models.gpt.heterogeneous.heterogeneous_layer_specs import get_gpt_heterogeneous_layer_spec

    activation = quick_gelu if model.args.get("quick_geglu") else torch.nn.functional.silu
    fields = {
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": activation,
        "add_bias_linear": False,
        "moe_token_dispatcher_type": "allgather",
        "moe_router_load_balancing_type": "none",
        **model.config,
    }
    if model.kind == "heterogeneous":
        from megatron.core.transformer.heterogeneous.heterogeneous_config import (
            HeterogeneousTransformerConfig as Config,
        )
    else:
        Config = getattr(transformer, model.kind)  # noqa: N806  a class
    config = Config(
        **fields,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
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
    if model.args.get("position_embedding_type") == "yarn":  # attributes without fields (argument_utils.py of 0.19)
        yarn = {f"yarn_{name}": value for name, value in {**_YARN, "mscale": 1.0, "mscale_all_dim": 0.0}.items()}
        yarn |= {"yarn_rotary_scaling_factor": _YARN["factor"], "yarn_correction_range_round_to_int": False}
        for name, value in yarn.items():
            setattr(config, name, value)
    if model.kind == "heterogeneous":
        spec = get_gpt_heterogeneous_layer_spec(config, False)
    else:
        spec = get_gpt_decoder_block_spec(config, False, normalization=config.normalization)
    mtp = get_gpt_mtp_block_spec(config, spec, False) if config.mtp_num_layers else None
    gpt = GPTModel(
        config=config,
        transformer_layer_spec=spec,
        mtp_block_spec=mtp,
        vocab_size=PADDED,
        max_sequence_length=LENGTH,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=False,
        position_embedding_type=model.args.get("position_embedding_type", "rope"),
        **model.gpt,
    ).to(dtype)
    for name, buffer in gpt.named_buffers():
        if name.endswith("expert_bias"):  # Megatron keeps it so (router.py, `_maintain_float32_expert_bias`)
            buffer.data = buffer.data.float()
    return gpt


def arguments_of(model: Model) -> argparse.Namespace:
    """Megatron-LM's saved arguments, as far as they say what the model is."""
    renamed = {"num_moe_experts": "num_experts"}
    fields = {renamed.get(name, name): value for name, value in model.config.items()}
    return argparse.Namespace(
        **{
            "max_position_embeddings": LENGTH,
            "normalization": "RMSNorm",
            "layernorm_epsilon": 1e-5,
            "layernorm_zero_centered_gamma": False,
            "swiglu": True,
            "add_bias_linear": False,
            "add_qkv_bias": False,
            "untie_embeddings_and_output_weights": True,
            "kv_channels": model.config["hidden_size"] // model.config["num_attention_heads"],
            "group_query_attention": False,
            "num_query_groups": 1,
            "rotary_base": 10000,
            "rotary_percent": 1.0,
            "rotary_interleaved": False,
            "tokenizer_type": "NullTokenizer",
            "vocab_size": VOCAB - 1,
            "padded_vocab_size": PADDED,
            **fields,
            **model.args,
        }
    )


def save(chunk: Any, model: Model, folder: Path) -> None:
    """A distributed checkpoint in Megatron-LM's folder layout. Called by every rank."""
    from megatron.core import dist_checkpointing, parallel_state

    iteration = folder / "iter_0000010"
    iteration.mkdir(parents=True, exist_ok=True)
    metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    state = {"args": arguments_of(model), "checkpoint_version": 3.0, "iteration": 10}
    dist_checkpointing.save({**state, "model": chunk.sharded_state_dict(metadata=metadata)}, str(iteration))
    torch.distributed.barrier()
    (folder / "latest_checkpointed_iteration.txt").write_text("10")


def write_logits(chunk: Any, path: Path) -> None:
    """Token ids and fp32 logits of the weights rounded to bfloat16."""
    from safetensors.torch import save_file

    with torch.no_grad():
        for parameter in chunk.parameters():
            parameter.copy_(parameter.to(torch.bfloat16))
        ids = torch.randint(0, VOCAB, (2, 32), generator=torch.Generator().manual_seed(1))
        mask = torch.triu(torch.ones(1, 1, 32, 32, dtype=torch.bool), 1)
        found = {"ids": ids}
        inputs = (ids, torch.arange(32).expand(2, -1), mask)
        if getattr(chunk, "mtp_process", False):  # only the loss is made of them: the states are taken on the way
            chunk.mtp.register_forward_hook(lambda _, __, states: found.update(states=states))
            chunk.eval()(*inputs, labels=ids)
            _, further = found.pop("states").chunk(2)
            found["mtp_logits"] = chunk.output_layer(further)[0].transpose(0, 1)[..., :VOCAB].contiguous()
            chunk.mtp_process, chunk.config.mtp_num_layers = False, None
        found["logits"] = chunk.eval()(*inputs)[..., :VOCAB].contiguous()
    save_file(found, path)


def main() -> None:
    """Be a rank of torchrun's, or the only one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=MODELS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--pp", type=int, default=1)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--logits", type=Path)
    arguments = parser.parse_args()
    model, layout = MODELS[arguments.name], options_of(arguments)
    megatron_on_cpu.substitute_cuda()
    substitute_for_latent_attention()
    substitute_for_windows()
    address = "env://" if "RANK" in os.environ else f"file://{tempfile.mkdtemp()}/rendezvous"
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=size)
    megatron_on_cpu.start_model_parallel(layout)
    chunk = build(model, torch.float32 if arguments.logits else torch.bfloat16, layout)
    fill_chunks([chunk], seed=arguments.seed, vocab=VOCAB, zero_centered_gamma=False)
    if arguments.logits:
        write_logits(chunk, arguments.logits)
    else:
        save(chunk, model, arguments.folder)
        print(json.dumps({"saved": str(arguments.folder)}))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
