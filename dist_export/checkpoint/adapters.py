"""Checkpoints that hold adapters (LoRA and the like) and not the model that they adapt."""

from __future__ import annotations

from dist_export.checkpoint.index import CheckpointIndex
from dist_export.errors import ExportError


def refuse_adapters(index: CheckpointIndex) -> None:
    """`ExportError` when the tensors are adapters, alone or beside a model's."""
    adapters = [name for name in index.tensors if ".adapter." in name or ".lora_" in name]
    if not adapters:
        return
    only = len(adapters) == len(index.tensors)
    what = "only adapter weights" if only else "a model and adapters that are not merged into it"
    raise ExportError(
        f"{index.folder}: holds {what} ({len(adapters)} tensors, such as {adapters[0]}). Merge them into the base "
        "model first (NeMo: llm.peft.merge_lora; Megatron-Bridge: examples/peft/merge_lora.py) and export the result"
    )
