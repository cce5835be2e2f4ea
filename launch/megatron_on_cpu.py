"""Build and save real Megatron-Core models on a CPU with gloo: no GPU, no TransformerEngine.

Programs call `hide_gpus` before they import torch or Megatron. The stand-ins for CUDA calls are the product's own
(`dist_export.verify.megatron_environment`). Importing this module imports nothing and changes nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import math
import os
import queue
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Style:
    """What makes a GPTModel a Llama, a GPT, …; field names follow Megatron-LM's arguments."""

    normalization: str
    activation: str
    bias: bool
    position_embedding_type: str
    rotary_percent: float
    tied: bool
    zero_centered_gamma: bool
    heads_per_group: int
    num_experts: int = 0

    @property
    def swiglu(self) -> bool:
        """Whether fc1 holds a gate half and an up half."""
        return self.activation == "swiglu"


STYLES = {
    "llama": Style("RMSNorm", "swiglu", False, "rope", 1.0, False, False, 4),
    "gpt": Style("LayerNorm", "gelu", True, "learned_absolute", 1.0, True, False, 1),
    "nemotron": Style("LayerNorm", "squared_relu", False, "rope", 0.5, False, True, 4),
    "mixtral": Style("RMSNorm", "swiglu", False, "rope", 1.0, False, False, 4, num_experts=4),
}


def hide_gpus() -> None:
    """Hide the GPUs from this process and silence third-party warnings. Called first of all."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)


_FOR_GOOD = contextlib.ExitStack()
"""Keeps what `substitute_cuda` replaced from being put back."""


def substitute_cuda() -> None:
    """Replace the CUDA calls Megatron-Core makes while building and saving a model. Call once per process."""
    hide_gpus()
    sys.path.append(str(Path(__file__).resolve().parent.parent))
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.core.transformer.moe import experts

    from dist_export.verify.megatron_environment import cuda_on_cpu
    from dist_export.verify.megatron_layers import latent_attention_on_cpu

    _FOR_GOOD.enter_context(cuda_on_cpu())
    _FOR_GOOD.enter_context(latent_attention_on_cpu())
    # The kernels of GroupedMLP are only needed to compute.
    experts.gg.assert_grouped_gemm_is_available = lambda: None
    # Otherwise every rank starts an interpreter, which imports all of this again, for a queue that a synchronous
    # save fills and empties itself.
    filesystem_async._results_queue = queue.Queue()


def num_ranks(options: argparse.Namespace) -> int:
    """The fewest ranks that hold the layout: a pipeline stage has whole groups of tp and of ep x expert tp."""
    return int(options.pp * math.lcm(options.tp, options.ep * options.etp))


def start_model_parallel(options: argparse.Namespace) -> None:
    """Lay the training layout out over the ranks; those that are left over become data-parallel replicas.

    Called by every rank after init_process_group. Raises ValueError when the ranks are no multiple of `num_ranks`.
    """
    import torch

    num_processes, fewest = torch.distributed.get_world_size(), num_ranks(options)
    if num_processes % fewest:
        experts = f" x ep {options.ep}, expert tp {options.etp}" if options.ep * options.etp > options.tp else ""
        raise ValueError(
            f"{num_processes} processes do not make tp {options.tp} x pp {options.pp}{experts}; start {fewest}"
        )
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(
        options.tp,
        options.pp,
        options.vpp if options.vpp > 1 else None,
        expert_model_parallel_size=options.ep,
        expert_tensor_parallel_size=options.etp,
    )


def transformer_config(options: argparse.Namespace, style: Style) -> Any:
    """Megatron-Core's configuration of the model; every fusion that needs a GPU is off."""
    import torch
    from megatron.core.activations import squared_relu
    from megatron.core.transformer import MLATransformerConfig, TransformerConfig

    functional = torch.nn.functional
    dtype = getattr(torch, options.dtype)
    return (MLATransformerConfig if options.kv_lora_rank else TransformerConfig)(
        num_layers=options.layers,
        hidden_size=options.hidden,
        ffn_hidden_size=options.ffn,
        num_attention_heads=options.heads,
        num_query_groups=options.kv_groups,
        kv_channels=options.head_size,
        normalization=style.normalization,
        layernorm_epsilon=options.norm_epsilon,
        # The local norm module cannot add one; the stored weights are the same either way.
        layernorm_zero_centered_gamma=False,
        gated_linear_unit=style.swiglu,
        activation_func={"swiglu": functional.silu, "gelu": functional.gelu, "squared_relu": squared_relu}[
            style.activation
        ],
        add_bias_linear=style.bias,
        add_qkv_bias=options.qkv_bias,
        qk_layernorm=options.qk_norm or bool(options.kv_lora_rank),
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=options.dtype == "bfloat16",
        fp16=options.dtype == "float16",
        tensor_model_parallel_size=options.tp,
        pipeline_model_parallel_size=options.pp,
        virtual_pipeline_model_parallel_size=options.vpp if options.vpp > 1 else None,
        num_layers_in_first_pipeline_stage=options.first_stage_layers,
        num_layers_in_last_pipeline_stage=options.last_stage_layers,
        pipeline_model_parallel_layout=options.pipeline_layout,
        mtp_num_layers=options.mtp_layers,
        **_expert_fields(options),
        **_latent_fields(options),
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


def _latent_fields(options: argparse.Namespace) -> dict[str, Any]:
    if not options.kv_lora_rank:
        return {}
    return {
        "q_lora_rank": options.q_lora_rank,
        "kv_lora_rank": options.kv_lora_rank,
        "qk_head_dim": options.head_size,
        "qk_pos_emb_head_dim": options.rope_head_size,
        "v_head_dim": options.head_size,
        "rope_type": "rope",
    }


def _expert_fields(options: argparse.Namespace) -> dict[str, Any]:
    if not options.experts:
        return {}
    return {
        "num_moe_experts": options.experts,
        "moe_router_topk": options.top_k,
        "moe_ffn_hidden_size": options.moe_ffn,
        "moe_layer_freq": options.moe_layers or 1,
        "moe_shared_expert_intermediate_size": options.shared_expert_ffn,
        "moe_shared_expert_gate": options.shared_expert_gate,
        "moe_grouped_gemm": options.grouped,
        "moe_use_legacy_grouped_gemm": options.grouped,
        "expert_model_parallel_size": options.ep,
        "expert_tensor_parallel_size": options.etp,
        "moe_token_dispatcher_type": "alltoall",
    }


def build_chunks(options: argparse.Namespace, style: Style) -> list[Any]:
    """This rank's model chunks, one per virtual pipeline stage, with unset weights. Called by every rank."""
    from megatron.core import parallel_state

    if options.vpp == 1:
        return [build_gpt(options, style, None)]
    chunks = []
    for stage in range(options.vpp):
        parallel_state.set_virtual_pipeline_model_parallel_rank(stage)
        chunks.append(build_gpt(options, style, stage))
    return chunks


def build_gpt(options: argparse.Namespace, style: Style, vp_stage: int | None) -> Any:
    """One chunk of a GPTModel in `options.dtype`. Called by every rank."""
    import torch
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_mtp_block_spec

    config = transformer_config(options, style)
    spec = get_gpt_decoder_block_spec(config, False, normalization=style.normalization, vp_stage=vp_stage)
    mtp = get_gpt_mtp_block_spec(config, spec, False, vp_stage=vp_stage) if options.mtp_layers else None
    model = GPTModel(
        config=config,
        transformer_layer_spec=spec,
        mtp_block_spec=mtp,
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
