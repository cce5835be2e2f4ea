"""Megatron-Core's own GPTModel, built from a model configuration and filled from the checkpoint: its logits, to compare
an export's with, and the model itself, whole or over tensor- and pipeline-parallel ranks.

It has the local layer spec and runs on the CPU, or on GPUs. For logits its layers are filled just before they run and
emptied afterwards: one layer's weights are in memory at a time.

Importing this module imports torch; megatron-core is imported when it runs.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.nn import functional

from dist_export.checkpoint.index import CheckpointIndex
from dist_export.errors import Faults
from dist_export.models.config import ModelConfig
from dist_export.verify import megatron_experts as experts
from dist_export.verify import megatron_layers as variants
from dist_export.verify import trace as at
from dist_export.verify.megatron_absorption import absorb_keys
from dist_export.verify.megatron_environment import ONE, Ranks, megatron_on_cpu
from dist_export.verify.megatron_weights import ParameterSource, Read, Rounding, Weights, parameter_sources
from dist_export.verify.records import read_box
from dist_export.verify.trace import Point, Trace


def run_megatron(
    index: CheckpointIndex,
    config: ModelConfig,
    tokens: torch.Tensor,
    *,
    dtype: torch.dtype = torch.float32,
    rounding: Rounding | None = None,
) -> Trace:
    """Run token ids [batch, position] through the checkpoint's model, computing in `dtype`.

    With `rounding` its weights are first rounded as an export rounds them.

    The logits cover the true vocabulary. Called in one process, which must not have a torch process group of its own.
    Raises `ExportError` when megatron-core is missing, when the configuration is one that is not built here, and when
    the checkpoint lacks a tensor of the model or holds others.
    """
    _check_supported(config, tokens.shape[1])
    with megatron_on_cpu():
        model = _build(config, dtype)
        if rounding is not None and rounding.qk_norm_epsilon is not None:
            _set_qk_norm_epsilon(model, rounding.qk_norm_epsilon)
        read = functools.partial(read_box, index)
        Weights(parameter_sources(model, index), config, read, rounding=rounding).stream_layers(model)
        trace = Trace()
        _watch(model, trace, config)
        length = tokens.shape[1]
        if rounding is not None and rounding.absorbs_keys:
            absorb_keys(model, config, trace, dtype=rounding.dtype, num_prompt=at.prompt_length(length))
        mask = torch.triu(torch.ones(1, 1, length, length, dtype=torch.bool), 1)
        with torch.no_grad():
            logits = model(tokens, torch.arange(length).expand(tokens.shape), mask)
        trace.logits = logits[..., : config.vocab_size].float()
    return trace


@contextlib.contextmanager
def loaded_model(
    index: CheckpointIndex, config: ModelConfig, *, dtype: torch.dtype, device: str = "cpu"
) -> Iterator[Any]:
    """The checkpoint's GPTModel with all its weights on `device`, to be run by `forward` within the context.

    Called in one process, which must not have a torch process group of its own. Raises as `run_megatron` does.
    """
    with loaded_stage(index, config, dtype=dtype, read=functools.partial(read_box, index), device=device) as (model, _):
        yield model


@contextlib.contextmanager
def loaded_stage(
    index: CheckpointIndex,
    config: ModelConfig,
    *,
    dtype: torch.dtype,
    read: Read,
    device: str = "cpu",
    ranks: Ranks = ONE,
    together: Callable[[set[str]], set[str]] = lambda keys: keys,
) -> Iterator[tuple[Any, Mapping[str, ParameterSource]]]:
    """This rank's tensor-parallel part of its pipeline stage of the checkpoint's GPTModel, with all its weights on
    `device`, and where the checkpoint has them; to be run by `forward_stage` within the context.

    `read` is asked for what this rank holds and nothing else; `together` as of `parameter_sources`. All ranks call it,
    none of which has a torch process group. Raises as `run_megatron` does.
    """
    _check_supported(config, 1)
    with megatron_on_cpu(ranks, on_gpu=device != "cpu"):
        model = _build(config, dtype, ranks)
        sources = parameter_sources(model, index, together=together)
        Weights(sources, config, read).fill_all(model)
        yield model.to(device), sources


def forward(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Logits [batch, position, padded vocabulary] of token ids [batch, position], on the model's device."""
    device, length = next(model.parameters()).device, tokens.shape[1]
    mask = torch.triu(torch.ones(1, 1, length, length, dtype=torch.bool, device=device), 1)
    with torch.no_grad():
        logits: torch.Tensor = model(tokens.to(device), torch.arange(length, device=device).expand(tokens.shape), mask)
    return logits


def forward_stage(model: Any, tokens: torch.Tensor) -> None:
    """Run token ids [batch, position] through all stages, each rank its own: hidden states go from stage to stage."""
    from megatron.core import parallel_state

    batch, length = tokens.shape
    parameter = next(model.parameters())
    if not model.pre_process:
        states = torch.empty(length, batch, model.config.hidden_size, dtype=parameter.dtype, device=parameter.device)
        torch.distributed.recv(states, parallel_state.get_pipeline_model_parallel_prev_rank())
        model.set_input_tensor(states)
    output = forward(model, tokens)
    if not model.post_process:
        assert output.dtype == parameter.dtype, f"a stage gives {output.dtype}, its weights are {parameter.dtype}"
        torch.distributed.send(output.contiguous(), parallel_state.get_pipeline_model_parallel_next_rank())


def _check_supported(config: ModelConfig, num_positions: int) -> None:
    faults = Faults("Megatron-Core's logits are not available for this model")
    faults.extend(experts.unsupported(config))
    if config.attention_output_gate:
        faults.add("its attention output is gated")
    longest = config.max_position_embeddings
    if num_positions > longest:
        faults.add(f"{num_positions} tokens are more than it sees at once ({longest}); give fewer")
    faults.raise_if_any()


def _activation(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    from megatron.core.activations import quick_gelu, squared_relu

    def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
        return functional.gelu(x, approximate="tanh")

    functions: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "gelu": functional.gelu,
        "gelu_tanh": gelu_tanh,
        "relu": functional.relu,
        "silu": functional.silu,
        "squared_relu": squared_relu,
        "quick_gelu": quick_gelu,
    }
    return functions[name]


def _transformer_config(config: ModelConfig, dtype: torch.dtype, ranks: Ranks) -> Any:
    return variants.config_class(config)(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.ffn_hidden_size,
        num_attention_heads=config.num_attention_heads,
        num_query_groups=config.num_query_groups,
        kv_channels=config.head_size,
        normalization=config.normalization,
        layernorm_epsilon=config.norm_epsilon,
        layernorm_zero_centered_gamma=False,  # the local norm cannot: one is added to the weights instead
        gated_linear_unit=config.gated,
        activation_func=_activation(config.activation),
        add_bias_linear=config.linear_bias,
        add_qkv_bias=config.qkv_bias,
        qk_layernorm=config.qk_norm,
        **experts.transformer_fields(config),
        **variants.fields(config),
        rotary_interleaved=config.rotary_interleaved,
        softmax_scale=None if config.query_pre_attn_scalar is None else config.query_pre_attn_scalar**-0.5,
        window_size=None if config.window_size is None else (config.window_size, 0),
        window_attn_skip_freq=None if config.window_layers is None else list(config.window_layers),
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        tensor_model_parallel_size=ranks.tp,
        pipeline_model_parallel_size=ranks.pp,
        num_layers_in_last_pipeline_stage=ranks.layers_of_last_stage(config.num_layers),
        bf16=dtype is torch.bfloat16,
        fp16=dtype is torch.float16,
        use_cpu_initialization=True,
        perform_initialization=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
    )


def _build(config: ModelConfig, dtype: torch.dtype, ranks: Ranks = ONE) -> Any:
    """This rank's part of a GPTModel, whose parameters have shapes and no storage."""
    from megatron.core.models.gpt import GPTModel

    from dist_export.verify.megatron_modules import add_scaling_and_capping, layer_spec

    scaling = config.rope_scaling
    transformer_config = _transformer_config(config, dtype, ranks)
    with torch.device("meta"):
        model = GPTModel(
            config=transformer_config,
            transformer_layer_spec=variants.block_spec(transformer_config, config) or layer_spec(config),
            vocab_size=config.padded_vocab_size,
            max_sequence_length=config.max_position_embeddings,
            pre_process=ranks.is_first_stage,
            post_process=ranks.is_last_stage,
            share_embeddings_and_output_weights=config.tied_embeddings,
            position_embedding_type=variants.add_yarn(transformer_config, config),
            rotary_percent=config.rotary_percent,
            rotary_base=config.rotary_base,
            seq_len_interpolation_factor=scaling.factor if scaling and scaling.kind == "linear" else None,
        )
    if scaling and scaling.kind == "llama3":
        rotary = model.rotary_pos_emb
        rotary.inv_freq = rotary._apply_scaling(
            rotary.inv_freq,
            scaling.factor,
            scaling.low_freq_factor,
            scaling.high_freq_factor,
            scaling.original_max_position_embeddings,
        )
    add_scaling_and_capping(model, config)
    return model.to(dtype).eval()


def _set_qk_norm_epsilon(model: Any, epsilon: float) -> None:
    for layer in model.decoder.layers:
        for norm in (layer.self_attention.q_layernorm, layer.self_attention.k_layernorm):
            norm.eps = epsilon


def _watch(model: Any, trace: Trace, config: ModelConfig) -> None:
    """Record hidden states as the modules compute them; Megatron has them as [position, batch, …]."""

    def output(name: str, layer: int | None = None) -> Callable[..., None]:
        def hook(_: object, __: object, result: Any) -> None:
            state, bias = result if isinstance(result, tuple) else (result, None)
            with_bias = state if bias is None or name == at.LAYER_OUTPUT else state + bias
            # The residual is added in place afterwards, so a copy.
            trace.record(Point(name, layer), with_bias.transpose(0, 1).clone())

        return hook

    def inputs(layer: int, *names: str) -> Callable[..., None]:
        def hook(_: object, arguments: tuple[torch.Tensor, ...]) -> None:
            for name, state in zip(names, arguments, strict=False):
                trace.record(Point(name, layer), state.transpose(0, 1))

        return hook

    def halves(layer: int) -> Callable[..., None]:
        """Megatron's MLP activates the first half of linear_fc1's output and multiplies it with the second."""

        def hook(_: object, __: object, result: tuple[torch.Tensor, torch.Tensor | None]) -> None:
            state = result[0] if result[1] is None else result[0] + result[1]
            parts = state.transpose(0, 1).chunk(2, -1) if config.gated else (state.transpose(0, 1),)
            for name, part in zip((at.GATE, at.UP)[-len(parts) :], parts, strict=True):
                trace.record(Point(name, layer), part)

        return hook

    model.embedding.register_forward_hook(output(at.EMBEDDING))
    for number, layer in enumerate(model.decoder.layers):
        attention, mlp = layer.self_attention, layer.mlp
        layer.register_forward_hook(output(at.LAYER_OUTPUT, number))
        if config.blocks is not None:  # what stands in the place of attention and MLP differs
            continue
        layer.input_layernorm.register_forward_hook(output(at.ATTENTION_NORM, number))
        attention.core_attention.register_forward_pre_hook(inputs(number, at.QUERY, at.KEY, at.VALUE))
        attention.linear_proj.register_forward_pre_hook(inputs(number, at.CONTEXT))
        attention.register_forward_hook(output(at.ATTENTION_OUTPUT, number))
        layer.pre_mlp_layernorm.register_forward_hook(output(at.MLP_NORM, number))
        if config.has_experts(number):
            point = Point(at.ROUTER, number)
            experts.watch_router(mlp.router, functools.partial(trace.record, point))
        else:
            mlp.linear_fc1.register_forward_hook(halves(number))
            mlp.linear_fc2.register_forward_pre_hook(inputs(number, at.ACTIVATION))
        mlp.register_forward_hook(output(at.MLP_OUTPUT, number))
    model.decoder.final_layernorm.register_forward_hook(output(at.FINAL_NORM))
