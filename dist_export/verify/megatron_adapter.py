"""Reference logits from Megatron-Core's own GPTModel, built from a model configuration and filled from the checkpoint.

Which stored tensor fills which parameter is Megatron's word (`sharded_state_dict`), so nothing of the exporter's rules
is shared; with it only the chunk table is, which says for every format what its tensors are and where they lie. The
model runs on the CPU with the local layer spec. Its layers are filled just before they run and emptied afterwards: one
layer's weights are in memory at a time.

Importing this module imports torch; megatron-core is imported when it runs.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from dist_export.checkpoint.index import CheckpointIndex
from dist_export.errors import Faults
from dist_export.models.config import ModelConfig
from dist_export.tensors.boxes import Box
from dist_export.verify import megatron_experts as experts
from dist_export.verify import megatron_layers as variants
from dist_export.verify import trace as at
from dist_export.verify.megatron_environment import megatron_on_cpu
from dist_export.verify.records import read_box
from dist_export.verify.trace import Point, Trace

_OTHER_NAMES = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
    "decoder.final_layernorm.": "decoder.final_norm.",
}
"""Keys of the fused layer spec -> what specs without fusion and older releases write."""


@dataclass(frozen=True, slots=True)
class Rounding:
    """How an export rounds the checkpoint's weights."""

    dtype: torch.dtype
    """Element type of the export."""
    stores_one: bool = False
    """Zero-centred norm weights are stored with their one added, in the checkpoint's element type."""
    keeps_router: bool = False
    """Routers are exported in float32."""
    qk_norm_epsilon: float | None = None
    """Of the consumer's norms of queries and keys, where it is its own."""


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
        weights = _Weights(index, _sources(model, index), config, rounding)
        weights.stream_layers(model)
        trace = Trace()
        _watch(model, trace, config)
        length = tokens.shape[1]
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
    _check_supported(config, 1)
    with megatron_on_cpu(on_gpu=device != "cpu"):
        model = _build(config, dtype)
        _Weights(index, _sources(model, index), config, None).fill_all(model)
        yield model.to(device)


def forward(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Logits [batch, position, padded vocabulary] of token ids [batch, position], on the model's device."""
    device, length = next(model.parameters()).device, tokens.shape[1]
    mask = torch.triu(torch.ones(1, 1, length, length, dtype=torch.bool, device=device), 1)
    with torch.no_grad():
        logits: torch.Tensor = model(tokens.to(device), torch.arange(length, device=device).expand(tokens.shape), mask)
    return logits


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


def _transformer_config(config: ModelConfig, dtype: torch.dtype) -> Any:
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


def _build(config: ModelConfig, dtype: torch.dtype) -> Any:
    """A GPTModel whose parameters have shapes and no storage."""
    from megatron.core.models.gpt import GPTModel

    from dist_export.verify.megatron_modules import add_scaling_and_capping, layer_spec

    scaling = config.rope_scaling
    transformer_config = _transformer_config(config, dtype)
    with torch.device("meta"):
        model = GPTModel(
            config=transformer_config,
            transformer_layer_spec=variants.block_spec(transformer_config, config) or layer_spec(config),
            vocab_size=config.padded_vocab_size,
            max_sequence_length=config.max_position_embeddings,
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


@dataclass(frozen=True, slots=True)
class _Source:
    """A parameter: the boxes of the checkpoint's tensors that it is put together from, in Megatron's order."""

    parts: tuple[tuple[str, Box], ...]
    merge: Callable[[list[torch.Tensor]], torch.Tensor]


def _sources(model: Any, index: CheckpointIndex) -> dict[str, _Source]:
    """Parameter name -> where the checkpoint has it, by Megatron's sharded state dict. Nothing may be left over."""
    names = {name for name in index.tensors if not name.startswith("mtp.")}  # further tokens are not predicted here
    layout = {
        "non_homogeneous_layers": any(name.startswith("decoder.layers.0.") for name in names),
        "singleton_local_shards": any(name.endswith("linear_fc1.weight_w") for name in names),
    }
    state = model.sharded_state_dict(metadata=layout)
    stored = [name for name, _ in (*model.named_parameters(), *model.named_buffers()) if name in state]
    sources = {name: _source(state[name], names) for name in stored}
    needed = {key for source in sources.values() for key, _ in source.parts}
    faults = Faults(f"{index.origin}: does not hold the tensors that Megatron-Core has for this model configuration")
    faults.extend(f"{key} is missing" for key in sorted(needed - names))
    faults.extend(f"{key} is not part of the model" for key in sorted(names - needed))
    for key, box in (part for source in sources.values() for part in source.parts):
        if key in names and not box.inside(index.tensors[key].shape):
            faults.add(f"{key} has shape {list(index.tensors[key].shape)}, the model takes {box} of it")
    faults.raise_if_any()
    return sources


def _source(entry: Any, names: set[str]) -> _Source:
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    if isinstance(entry, ShardedTensor):
        return _Source((_part(entry, names),), lambda tensors: tensors[0])
    assert isinstance(entry, ShardedTensorFactory), f"{type(entry).__name__} in a sharded state dict"
    shards = entry.build()
    assert isinstance(shards, list), f"{entry.key} is built into a {type(shards).__name__}"
    return _Source(tuple(_part(shard, names) for shard in shards), entry.merge_fn)


def _part(shard: Any, names: set[str]) -> tuple[str, Box]:
    """Key and box of a Megatron ShardedTensor, whose first `prepend_axis_num` dims only its key's tensor has."""
    key = shard.key
    for fused, other in _OTHER_NAMES.items():
        if key not in names and key.replace(fused, other) in names:
            key = key.replace(fused, other)
    size = (1,) * shard.prepend_axis_num + tuple(shard.local_shape)
    return key, Box(tuple(shard.global_offset), size)


class _Weights:
    """Fills parameters from the checkpoint."""

    def __init__(
        self, index: CheckpointIndex, sources: Mapping[str, _Source], config: ModelConfig, rounding: Rounding | None
    ) -> None:
        self.index, self.sources, self.rounding = index, sources, rounding
        self.zero_centered_norm = config.zero_centered_norm

    def fill_all(self, model: Any) -> None:
        """Fill the whole model."""
        self._fill(model, "", recurse=True)

    def stream_layers(self, model: Any) -> None:
        """Fill all of the model but its layers, which are filled when they run and emptied again."""
        layers = model.decoder.layers
        inner = {parameter for layer in layers for parameter in layer.parameters()}
        for name, module in model.named_modules():
            if not any(parameter in inner for parameter in module.parameters(recurse=False)):
                self._fill(module, name, recurse=False)
        for number, layer in enumerate(layers):
            name = f"decoder.layers.{number}"
            layer.register_forward_pre_hook(lambda module, _, name=name: self._fill(module, name, recurse=True))
            layer.register_forward_hook(lambda module, *_: module.to("meta") and None)

    def _fill(self, module: torch.nn.Module, prefix: str, *, recurse: bool) -> None:
        for inner, owner in module.named_modules() if recurse else [("", module)]:
            is_norm = isinstance(owner, (torch.nn.LayerNorm, torch.nn.RMSNorm))
            for kind, parameter in owner.named_parameters(recurse=False):
                name = ".".join(filter(None, (prefix, inner, kind)))
                add_one = is_norm and kind == "weight" and self.zero_centered_norm
                stored = self._read(self.sources[name]).reshape(parameter.shape)
                exact = name.endswith("router.weight") and self.rounding is not None and self.rounding.keeps_router
                values = (stored if exact else self._rounded(stored, add_one=add_one)).to(parameter.dtype)
                setattr(owner, kind, torch.nn.Parameter(values, requires_grad=False))
            for kind, _ in owner.named_buffers(recurse=False):
                name = ".".join(filter(None, (prefix, inner, kind)))
                if name in self.sources:  # the router's expert bias, which stays as it is
                    setattr(owner, kind, self._read(self.sources[name]))

    def _rounded(self, stored: torch.Tensor, *, add_one: bool) -> torch.Tensor:
        """The values of a stored tensor in the model, with the one of a zero-centred norm."""
        if self.rounding is None:
            return stored.float() + 1 if add_one else stored
        if add_one and self.rounding.stores_one:
            return (stored + 1).to(self.rounding.dtype)
        rounded = stored.to(self.rounding.dtype)
        return rounded.float() + 1 if add_one else rounded

    def _read(self, source: _Source) -> torch.Tensor:
        return source.merge([read_box(self.index, key, box) for key, box in source.parts])


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
