"""Build and save real Megatron-Core models on a CPU with gloo: no GPU, no TransformerEngine.

Import this module before anything of torch or Megatron: it hides the GPUs and silences third-party warnings.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import warnings
from dataclasses import dataclass
from typing import Any

os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
warnings.simplefilter("ignore")
logging.disable(logging.WARNING)

import torch  # noqa: E402


@dataclass(frozen=True)
class Style:
    """What makes a GPTModel a Llama, a GPT or a Nemotron; field names follow Megatron-LM's arguments."""

    normalization: str
    activation: str
    bias: bool
    position_embedding_type: str
    rotary_percent: float
    tied: bool
    zero_centered_gamma: bool
    heads_per_group: int

    @property
    def swiglu(self) -> bool:
        """Whether fc1 holds a gate half and an up half."""
        return self.activation == "swiglu"


STYLES = {
    "llama": Style("RMSNorm", "swiglu", False, "rope", 1.0, False, False, 4),
    "gpt": Style("LayerNorm", "gelu", True, "learned_absolute", 1.0, True, False, 1),
    "nemotron": Style("LayerNorm", "squared_relu", False, "rope", 0.5, False, True, 4),
}


class _NoRngTracker:
    """Stands in for the tracker of CUDA random states: weights are filled afterwards, so nothing is drawn."""

    def fork(self, *_: object) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


def substitute_cuda() -> None:
    """Replace the CUDA calls Megatron-Core makes while building and saving a model. Call once per process."""
    from megatron.core import tensor_parallel
    from megatron.core.tensor_parallel import layers, random

    on_cpu: dict[str, Any] = {
        "current_device": lambda: "cpu",
        "synchronize": lambda *_: None,
        "Stream": lambda *_, **__: None,
        "get_device_capability": lambda *_: (9, 0),
    }
    for name, stand_in in on_cpu.items():
        setattr(torch.cuda, name, stand_in)
    torch.Tensor.cuda = lambda tensor, *_, **__: tensor  # type: ignore[method-assign]
    for module in (random, tensor_parallel, layers):
        module.get_cuda_rng_tracker = lambda *_, **__: _NoRngTracker()


def start_model_parallel(*, tp: int, pp: int) -> None:
    """Lay out tp x pp over the ranks; those beyond tp * pp become data-parallel replicas.

    Called by every rank after init_process_group. Raises ValueError when the ranks are no multiple of tp * pp.
    """
    num_processes = torch.distributed.get_world_size()
    if num_processes % (tp * pp):
        raise ValueError(f"{num_processes} processes do not make tp {tp} x pp {pp}; start {tp * pp}")
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(tp, pp)


def transformer_config(options: argparse.Namespace, style: Style) -> Any:
    """Megatron-Core's configuration of the model; every fusion that needs a GPU is off."""
    from megatron.core.activations import squared_relu
    from megatron.core.transformer import TransformerConfig

    functional = torch.nn.functional
    dtype = getattr(torch, options.dtype)
    return TransformerConfig(
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
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=options.dtype == "bfloat16",
        fp16=options.dtype == "float16",
        tensor_model_parallel_size=options.tp,
        pipeline_model_parallel_size=options.pp,
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


def build_gpt(options: argparse.Namespace, style: Style) -> Any:
    """This rank's part of a GPTModel with unset weights in `options.dtype`. Called by every rank."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    model = GPTModel(
        config=transformer_config(options, style),
        transformer_layer_spec=get_gpt_layer_local_spec(normalization=style.normalization),
        vocab_size=options.padded_vocab,
        max_sequence_length=options.seq,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=style.tied,
        position_embedding_type=style.position_embedding_type,
        rotary_percent=style.rotary_percent,
        rotary_base=options.rotary_base,
    )
    return model.to(getattr(torch, options.dtype))
