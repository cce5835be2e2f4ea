"""Very large models as checkpoints without weights: real metadata, sparse files, sizes as they would be trained.

`.metadata` is a pickle of torch's own classes, save plans of all ranks inside, as Megatron-Core 0.11 on leaves it.
"""

from __future__ import annotations

import argparse
import json
import math
import pickle
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

Shape = tuple[int, ...]
RECORD_OVERHEAD = 1536
"""Bytes that a torch.save zip adds to its storage, about."""


@dataclass(frozen=True)
class StoredTensor:
    """A global tensor and into how many equal chunks each of its dims is cut."""

    shape: Shape
    grid: Shape

    @property
    def num_chunks(self) -> int:
        return math.prod(self.grid)


@dataclass(frozen=True, kw_only=True)
class LargeModel:
    """A Llama-style model, dense or with experts in every layer, and how it was trained."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_heads: int
    num_groups: int
    vocab_size: int
    head_size: int = 128
    num_experts: int = 0
    tp: int = 8
    expert_tp: int = 1
    per_layer: bool = False
    """One key per layer (and per expert) instead of tensors stacked over them."""

    def tensors(self) -> dict[str, StoredTensor]:
        """Every weight by its global name."""
        h, tp = self.hidden_size, self.tp
        query, key_value = self.num_heads * self.head_size, 2 * self.num_groups * self.head_size
        layer = {
            "self_attention.linear_qkv.weight": StoredTensor((query + key_value, h), (tp, 1)),
            "self_attention.linear_qkv.layer_norm_weight": StoredTensor((h,), (1,)),
            "self_attention.linear_proj.weight": StoredTensor((h, query), (1, tp)),
        }
        if self.num_experts:
            layer |= {
                "pre_mlp_layernorm.weight": StoredTensor((h,), (1,)),
                "mlp.router.weight": StoredTensor((self.num_experts, h), (1, 1)),
            }
        else:
            layer |= {"mlp.linear_fc1.layer_norm_weight": StoredTensor((h,), (1,)), **self._mlp("mlp.", tp)}
        return {
            "embedding.word_embeddings.weight": StoredTensor((self.vocab_size, h), (tp, 1)),
            "output_layer.weight": StoredTensor((self.vocab_size, h), (tp, 1)),
            "decoder.final_layernorm.weight": StoredTensor((h,), (1,)),
            **dict(self._over_layers(layer)),
            **(dict(self._over_experts()) if self.num_experts else {}),
        }

    def arguments(self) -> dict[str, Any]:
        """What Megatron-LM would have saved as its arguments, as far as it decides the model."""
        return {
            "num_layers": self.num_layers,
            "hidden_size": self.hidden_size,
            "ffn_hidden_size": self.ffn_hidden_size,
            "num_attention_heads": self.num_heads,
            "group_query_attention": True,
            "num_query_groups": self.num_groups,
            "kv_channels": self.head_size,
            "normalization": "RMSNorm",
            "swiglu": True,
            "position_embedding_type": "rope",
            "add_bias_linear": False,
            "rotary_base": 500000,
            "max_position_embeddings": 131072,
            "padded_vocab_size": self.vocab_size,
            "untie_embeddings_and_output_weights": True,
            "num_experts": self.num_experts or None,
            "moe_router_topk": 8,
            "moe_ffn_hidden_size": self.ffn_hidden_size,
            "layernorm_epsilon": 1e-5,
            "params_dtype": "bfloat16",
        }

    def _mlp(self, prefix: str, tp: int) -> dict[str, StoredTensor]:
        """Gate and up halves of linear_fc1 are chunks of their own: each rank saves its slice of either."""
        return {
            f"{prefix}linear_fc1.weight": StoredTensor((2 * self.ffn_hidden_size, self.hidden_size), (2 * tp, 1)),
            f"{prefix}linear_fc2.weight": StoredTensor((self.hidden_size, self.ffn_hidden_size), (1, tp)),
        }

    def _over_layers(self, layer: Mapping[str, StoredTensor]) -> Iterator[tuple[str, StoredTensor]]:
        for name, tensor in layer.items():
            if self.per_layer:
                yield from ((f"decoder.layers.{i}.{name}", tensor) for i in range(self.num_layers))
            else:
                yield f"decoder.layers.{name}", _stacked(tensor, self.num_layers)

    def _over_experts(self) -> Iterator[tuple[str, StoredTensor]]:
        for name, tensor in self._mlp("", self.expert_tp).items():
            if self.per_layer:
                for layer, expert in product(range(self.num_layers), range(self.num_experts)):
                    yield f"decoder.layers.{layer}.mlp.experts.experts.{expert}.{name}", tensor
            else:
                yield f"decoder.layers.mlp.experts.experts.{name}", _stacked(tensor, self.num_layers, self.num_experts)


def _stacked(tensor: StoredTensor, *sizes: int) -> StoredTensor:
    return StoredTensor((*sizes, *tensor.shape), (*sizes, *tensor.grid))


def dense_405b(**changes: Any) -> LargeModel:
    """The sizes of Llama 3.1 405B."""
    sizes = {"num_layers": 126, "hidden_size": 16384, "ffn_hidden_size": 53248, "num_heads": 128, "num_groups": 8}
    return LargeModel(**{**sizes, "vocab_size": 128256, **changes})


def moe_1t(**changes: Any) -> LargeModel:
    """A trillion parameters: 60 layers of 256 experts."""
    sizes = {"num_layers": 60, "hidden_size": 7168, "ffn_hidden_size": 3072, "num_heads": 64, "num_groups": 8}
    return LargeModel(**{**sizes, "vocab_size": 131072, "num_experts": 256, **changes})


def num_chunks(tensors: Mapping[str, StoredTensor]) -> int:
    """Chunks of all tensors together."""
    return sum(tensor.num_chunks for tensor in tensors.values())


def write_large_checkpoint(
    folder: Path, model: LargeModel, *, num_files: int = 64, plans: bool = True, optimizer: bool = False
) -> Path:
    """Write `model` as an iteration folder without weights: metadata, arguments, sparse files of the right sizes.

    With `optimizer` every weight has three float32 tensors of optimizer state, chunked as the weight is.
    """
    # Imported here, so that shapes alone cost no torch.
    import torch
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import (
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        TensorProperties,
        TensorStorageMetadata,
    )
    from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

    folder.mkdir(parents=True, exist_ok=True)
    metadata, plan_items = Metadata({}, None, {}), [[] for _ in range(num_files)]  # type: ignore[var-annotated]
    ends = [0] * num_files
    for name, tensor in _with_optimizer(model.tensors(), optimizer):
        dtype = torch.float32 if name.startswith("optimizer.") else torch.bfloat16
        properties = TensorProperties(dtype=dtype)
        boxes = [ChunkStorageMetadata(torch.Size(start), torch.Size(size)) for start, size in _chunks(tensor)]
        metadata.state_dict_metadata[name] = TensorStorageMetadata(properties, torch.Size(tensor.shape), boxes)
        length = math.prod(boxes[0].sizes) * dtype.itemsize + RECORD_OVERHEAD
        for number, box in enumerate(boxes):
            index, file = MetadataIndex(name, box.offsets, number), number % num_files
            metadata.storage_data[index] = _StorageInfo(f"__{file}_0.distcp", ends[file], length)
            ends[file] += length
            data = TensorWriteData(box, properties, torch.Size(tensor.shape))
            plan_items[file].append(WriteItem(index, WriteItemType.SHARD, None, data))
    if plans:
        metadata.all_local_plans = [SavePlan(items) for items in plan_items]  # type: ignore[attr-defined]
    for file, end in enumerate(ends):
        with (folder / f"__{file}_0.distcp").open("wb") as stream:
            stream.truncate(end)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata, 4))
    torch.save({"iteration": 10, "args": argparse.Namespace(**model.arguments())}, folder / "common.pt")
    (folder / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1}))
    return folder


def _with_optimizer(
    tensors: Mapping[str, StoredTensor], optimizer: bool
) -> Iterator[tuple[str, StoredTensor]]:
    for name, tensor in tensors.items():
        yield name, tensor
        if optimizer:
            for state in ("fp32_param", "exp_avg", "exp_avg_sq"):
                yield f"optimizer.state.{state}.{name}", tensor


def _chunks(tensor: StoredTensor) -> Iterator[tuple[Shape, Shape]]:
    size = tuple(n // parts for n, parts in zip(tensor.shape, tensor.grid, strict=True))
    for position in product(*map(range, tensor.grid)):
        yield tuple(i * n for i, n in zip(position, size, strict=True)), size
