"""Filling Megatron-Core's parameters from a checkpoint of any layout.

Which stored tensor fills which parameter is Megatron's word (`sharded_state_dict`), so nothing of the exporter's rules
is shared; with it only the chunk table is, which says for every format what its tensors are and where they lie.

Importing this module imports torch; megatron-core is imported when it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from msgspec import Struct

from dist_export.checkpoint.index import CheckpointIndex
from dist_export.errors import Faults
from dist_export.models.config import ModelConfig
from dist_export.tensors.boxes import Box

_OTHER_NAMES = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
    "decoder.final_layernorm.": "decoder.final_norm.",
}
"""Keys of the fused layer spec -> what specs without fusion and older releases write."""


class Rounding(Struct, frozen=True):
    """How an export rounds the checkpoint's weights."""

    dtype: torch.dtype
    """Element type of the export."""
    stores_one: bool = False
    """Zero-centred norm weights are stored with their one added, in the checkpoint's element type."""
    keeps_router: bool = False
    """Routers are exported in float32."""
    qk_norm_epsilon: float | None = None
    """Of the consumer's norms of queries and keys, where it is its own."""
    absorbs_keys: bool = False
    """Products of queries' and keys' projections of latent attention are stored, for generated tokens."""


Read = Callable[[str, Box], torch.Tensor]
"""Reads a box of a stored tensor, in its stored element type."""


class ParameterSource(Struct, frozen=True):
    """A parameter: the boxes of the checkpoint's tensors that it is put together from, in Megatron's order."""

    parts: tuple[tuple[str, Box], ...]
    merge: Callable[[list[torch.Tensor]], torch.Tensor]


def parameter_sources(
    model: Any, index: CheckpointIndex, *, together: Callable[[set[str]], set[str]] = lambda keys: keys
) -> dict[str, ParameterSource]:
    """Parameter name -> where the checkpoint has it, by Megatron's sharded state dict. Nothing may be left over.

    Where several ranks hold the model, all of them call it, and `together` makes the union of their sets of keys.
    """
    names = {name for name in index.tensors if not name.startswith("mtp.")}  # further tokens are not predicted here
    layout = {
        "non_homogeneous_layers": any(name.startswith("decoder.layers.0.") for name in names),
        "singleton_local_shards": any(name.endswith("linear_fc1.weight_w") for name in names),
    }
    state = model.sharded_state_dict(metadata=layout)
    stored = [name for name, _ in (*model.named_parameters(), *model.named_buffers()) if name in state]
    sources = {name: _source(state[name], names) for name in stored}
    needed = together({key for source in sources.values() for key, _ in source.parts})
    faults = Faults(f"{index.origin}: does not hold the tensors that Megatron-Core has for this model configuration")
    faults.extend(f"{key} is missing" for key in sorted(needed - names))
    faults.extend(f"{key} is not part of the model" for key in sorted(names - needed))
    for key, box in (part for source in sources.values() for part in source.parts):
        if key in names and not box.inside(index.tensors[key].shape):
            faults.add(f"{key} has shape {list(index.tensors[key].shape)}, the model takes {box} of it")
    faults.raise_if_any()
    return sources


def _source(entry: Any, names: set[str]) -> ParameterSource:
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    if isinstance(entry, ShardedTensor):
        return ParameterSource((_part(entry, names),), lambda tensors: tensors[0])
    assert isinstance(entry, ShardedTensorFactory), f"{type(entry).__name__} in a sharded state dict"
    shards = entry.build()
    assert isinstance(shards, list), f"{entry.key} is built into a {type(shards).__name__}"
    return ParameterSource(tuple(_part(shard, names) for shard in shards), entry.merge_fn)


def _part(shard: Any, names: set[str]) -> tuple[str, Box]:
    """Key and box of a Megatron ShardedTensor, whose first `prepend_axis_num` dims only its key's tensor has."""
    key = shard.key
    for fused, other in _OTHER_NAMES.items():
        if key not in names and key.replace(fused, other) in names:
            key = key.replace(fused, other)
    size = (1,) * shard.prepend_axis_num + tuple(shard.local_shape)
    return key, Box(tuple(shard.global_offset), size)


class Weights:
    """Fills parameters from the checkpoint."""

    def __init__(
        self,
        sources: Mapping[str, ParameterSource],
        config: ModelConfig,
        read: Read,
        *,
        rounding: Rounding | None = None,
    ) -> None:
        self.sources, self.read, self.rounding = sources, read, rounding
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

    def _read(self, source: ParameterSource) -> torch.Tensor:
        return source.merge([self.read(key, box) for key, box in source.parts])
