"""The training arguments that Megatron-LM saves with a checkpoint, for a model of `make_checkpoint.py`."""

from __future__ import annotations

import argparse
import signal
from typing import Any

import torch
from megatron_on_cpu import Style


def training_arguments(options: argparse.Namespace, style: Style) -> argparse.Namespace:
    """The arguments Megatron-LM would have saved, as far as they describe the model and its layout. Called by ranks.

    `vocab_size` is one less than the true size: that is how Megatron-LM's NullTokenizer is told it.
    """
    from megatron.core.transformer.enums import AttnBackend

    new = options.arg_generation == "new"
    renamed = {
        "layernorm_epsilon" if new else "norm_epsilon": options.norm_epsilon,
        "layernorm_zero_centered_gamma" if new else "apply_layernorm_1p": style.zero_centered_gamma,
    }
    return argparse.Namespace(
        **renamed,
        **_model_arguments(options, style),
        **_expert_arguments(options),
        **_layout_arguments(options, torch.distributed.get_world_size()),
        params_dtype=getattr(torch, options.dtype),
        bf16=options.dtype == "bfloat16",
        fp16=options.dtype == "float16",
        fp8=None,
        attention_backend=AttnBackend.auto,
        exit_signal=signal.SIGTERM,
    )


def _model_arguments(options: argparse.Namespace, style: Style) -> dict[str, Any]:
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
        "rope_type": "rope" if options.kv_lora_rank else None,
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
        "add_qkv_bias": options.qkv_bias,
        "untie_embeddings_and_output_weights": not style.tied,
        "tokenizer_type": "NullTokenizer",
        "tokenizer_model": None,
        "vocab_file": None,
        "merge_file": None,
        "vocab_size": options.vocab - 1,
        "padded_vocab_size": options.padded_vocab,
        "make_vocab_size_divisible_by": options.vocab_divisor,
        "qk_layernorm": options.qk_norm or bool(options.kv_lora_rank),
        "qk_l2_norm": False,
        "apply_query_key_layer_scaling": False,
        "apply_residual_connection_post_layernorm": False,
        "attention_softmax_in_fp32": False,
        "softmax_type": "vanilla",
        "window_size": None,
        # The sizes have defaults in every file.
        "multi_latent_attention": bool(options.kv_lora_rank),
        "q_lora_rank": options.q_lora_rank,
        "kv_lora_rank": options.kv_lora_rank or 32,
        "qk_head_dim": options.head_size if options.kv_lora_rank else 128,
        "qk_pos_emb_head_dim": options.rope_head_size if options.kv_lora_rank else 64,
        "v_head_dim": options.head_size if options.kv_lora_rank else 128,
        "mtp_num_layers": options.mtp_layers,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    }


def _expert_arguments(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "num_experts": options.experts or None,
        "moe_router_topk": options.top_k,
        "moe_router_pre_softmax": False,
        "moe_router_score_function": "softmax",
        "moe_router_enable_expert_bias": False,
        "moe_router_num_groups": None,
        "moe_router_group_topk": None,
        "moe_router_topk_scaling_factor": None,
        "moe_layer_freq": options.moe_layers or 1,
        "moe_ffn_hidden_size": options.moe_ffn,
        "moe_shared_expert_intermediate_size": options.shared_expert_ffn,
        "moe_shared_expert_gate": options.shared_expert_gate,
        "moe_grouped_gemm": options.grouped,
        "moe_use_legacy_grouped_gemm": options.grouped,
    }


def _layout_arguments(options: argparse.Namespace, world_size: int) -> dict[str, Any]:
    return {
        "world_size": world_size,
        "tensor_model_parallel_size": options.tp,
        "pipeline_model_parallel_size": options.pp,
        "virtual_pipeline_model_parallel_size": options.vpp if options.vpp > 1 else None,
        "num_layers_per_virtual_pipeline_stage": None,
        "decoder_first_pipeline_num_layers": options.first_stage_layers,
        "decoder_last_pipeline_num_layers": options.last_stage_layers,
        "account_for_embedding_in_pipeline_split": False,
        "account_for_loss_in_pipeline_split": False,
        "pipeline_model_parallel_layout": options.pipeline_layout,
        "context_parallel_size": 1,
        "expert_model_parallel_size": options.ep,
        "expert_tensor_parallel_size": options.etp,
        "data_parallel_size": world_size // (options.tp * options.pp),
        "sequence_parallel": False,
        "transformer_impl": "local",
        "spec": None,
        "ckpt_format": {"torch_dist": "torch_dist", "legacy": "torch"}[options.format],
        "use_legacy_models": False,
        "use_distributed_optimizer": False,
        "optimizer": "adam",
        "iteration": options.iteration,
        "train_iters": options.iteration,
        "seed": options.seed,
    }
