"""Dividing a model's tensors among ``model-xxxxx-of-yyyyy.safetensors`` files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dist_export.plan.shard import PlannedTensor, ShardPlan, place

DEFAULT_FILE_BYTES = 5 << 30  # the size at which the hub's own tools split
INDEX = "model.safetensors.index.json"


def split_files(tensors: Sequence[PlannedTensor], most_bytes: int) -> list[list[PlannedTensor]]:
    """Tensors in order, in as few files as `most_bytes` allows and of about equal size.

    A tensor larger than `most_bytes` gets a file of its own.
    """
    total = sum(tensor.num_bytes for tensor in tensors)
    num_files = max(-(-total // most_bytes), 1)
    share = min(-(-total // num_files), most_bytes)
    files: list[list[PlannedTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if files[-1] and size + tensor.num_bytes > most_bytes:
            files.append([])
            size = 0
        files[-1].append(tensor)
        size += tensor.num_bytes
        if size >= share and tensor is not tensors[-1]:
            files.append([])
            size = 0
    return [file for file in files if file] or [[]]


def name_files(files: Sequence[Sequence[PlannedTensor]]) -> dict[int, ShardPlan]:
    """Shard plans with the names that loaders look for; a single file has no number."""
    if len(files) == 1:
        return {0: place(files[0], "model.safetensors")}
    return {n: place(file, f"model-{n + 1:05d}-of-{len(files):05d}.safetensors") for n, file in enumerate(files)}


def build_index(shards: Mapping[int, ShardPlan]) -> dict[str, object]:
    """model.safetensors.index.json: which file holds which tensor (huggingface_hub/serialization)."""
    weight_map = {tensor.name: shard.file_name for shard in shards.values() for tensor in shard.tensors}
    total = sum(shard.num_data_bytes for shard in shards.values())
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
