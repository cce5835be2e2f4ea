"""Adapter checkpoints as Megatron-Bridge and NeMo 2 write them, and their merge in torch, apart from the product's."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from support.torch_dist import Chunks, read_metadata, write_torch_dist

LORA = {"_target_": "megatron.bridge.peft.lora.LoRA", "dim": 4, "alpha": 10, "dropout": 0.1, "dropout_position": "pre"}
CANONICAL = {**LORA, "_target_": "megatron.bridge.peft.canonical_lora.CanonicalLoRA", "normalize_moe_lora": False}
DENSE = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")
ITERATION = 20


def lora(
    base: dict[str, torch.Tensor], modules: tuple[str, ...] = DENSE, *, rank: int = 4, dtype: torch.dtype | None = None
) -> dict[str, torch.Tensor]:
    """Random matrices A and B for modules of stacked layers; of experts with one pair per expert."""
    generator, tensors = torch.Generator().manual_seed(5), {}
    for module in modules:
        weight = base[f"decoder.layers.{module}.weight"]
        *lead, rows, columns = weight.shape
        for side, shape in {"in": (*lead, rank, columns), "out": (*lead, rows, rank)}.items():
            values = torch.randn(shape, generator=generator) * 0.3
            tensors[f"decoder.layers.{module}.adapter.linear_{side}.weight"] = values.to(dtype or weight.dtype)
    return tensors


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """B @ A in float32, summed in the order of the rank."""
    a, b = a.float(), b.float()
    total = b[..., :, :1] * a[..., :1, :]
    for k in range(1, a.shape[-2]):
        total = total + b[..., :, k : k + 1] * a[..., k : k + 1, :]
    return total


def added(weight: torch.Tensor, update: torch.Tensor, *, alpha: float, rank: int) -> torch.Tensor:
    """``weight + alpha / rank * update``, rounded once."""
    return (weight.float() + torch.tensor(alpha / rank) * update).to(weight.dtype)


def merged(
    base: dict[str, torch.Tensor], adapters: dict[str, torch.Tensor], *, alpha: float
) -> dict[str, torch.Tensor]:
    """The base's tensors with plain LoRA adapters added; A and B may lack leading dims that the weight has."""
    result = dict(base)
    for name, a in adapters.items():
        if name.endswith(".adapter.linear_in.weight"):
            module, b = name.removesuffix(".adapter.linear_in.weight"), adapters[name.replace("_in.", "_out.")]
            weight = base[f"{module}.weight"]
            lead = weight.shape[:-2]
            a, b = (t.reshape(*t.shape[:-2], *(1,) * (len(lead) - t.dim() + 2), *t.shape[-2:]) for t in (a, b))
            update = product(a.expand(*lead, *a.shape[-2:]), b.expand(*lead, *b.shape[-2:]))
            result[f"{module}.weight"] = added(weight, update, alpha=alpha, rank=a.shape[-2])
    return result


def write_bridge_adapters(
    top: Path,
    tensors: dict[str, torch.Tensor],
    *,
    peft: dict[str, Any] | None = LORA,
    tp: int = 1,
    chunks: Chunks | None = None,
    **model: Any,
) -> Path:
    """A Megatron-Bridge --save folder of a PEFT run: adapters alone (training/checkpointing.py,
    `apply_peft_adapter_filter_to_state_dict`), and run_config.yaml (training/config.py, `ConfigContainer.to_yaml`)."""
    folder = write_torch_dist(top / f"iter_{ITERATION:07d}", tensors, args=None, chunks=chunks)
    state = torch.load(folder / "common.pt", weights_only=False)
    torch.save({**state, "iteration": ITERATION}, folder / "common.pt")
    config = {"_target_": "megatron.bridge.models.llama.llama_provider.LlamaModelProvider", **model}
    config |= {"tensor_model_parallel_size": tp, "num_layers": 4, "hidden_size": 64, "num_attention_heads": 4}
    document = {"_target_": "megatron.bridge.training.config.ConfigContainer", "model": config, "peft": peft}
    (folder / "run_config.yaml").write_text(yaml.safe_dump(document))
    (top / "latest_checkpointed_iteration.txt").write_text(str(ITERATION))
    return top


def write_nemo2_adapters(
    top: Path, tensors: dict[str, torch.Tensor], *, lora: dict[str, Any] = LORA, chunks: Chunks | None = None
) -> Path:
    """A NeMo 2 adapter checkpoint: nemo/lightning/pytorch/callbacks/peft.py, `WrappedAdapterIO.save_checkpoint`, and
    context/model.yaml with ``model_transform`` (nemo/collections/llm/api.py, `_set_with_io`)."""
    write_torch_dist(top / "weights", tensors, args=None, prefix="module.", chunks=chunks)
    state = torch.load(top / "weights" / "common.pt", weights_only=False)
    torch.save({**state, "global_step": ITERATION}, top / "weights" / "common.pt")
    (top / "weights" / "adapter_metadata.json").write_text(json.dumps({"model_ckpt_path": "/models/base"}))
    (top / "context").mkdir()
    transform = {**lora, "_target_": lora["_target_"].replace("megatron.bridge.peft", "nemo.collections.llm.peft")}
    model = {"_target_": "nemo.collections.llm.gpt.model.llama.LlamaModel", "config": {"num_layers": 4}}
    (top / "context" / "model.yaml").write_text(yaml.safe_dump({**model, "model_transform": transform}))
    return top


def rewritten(checkpoint: Path, tensors: dict[str, torch.Tensor], folder: Path) -> Path:
    """The iteration folder `checkpoint` with other values: what an export of the merged model starts from."""
    write_torch_dist(folder, tensors, args=None)
    shutil.copy(checkpoint / "common.pt", folder / "common.pt")
    return folder


def read_torch_dist(folder: Path, *, prefix: str = "") -> dict[str, torch.Tensor]:
    """The model's tensors of an iteration folder, or those whose names begin with `prefix`, read by torch."""
    metadata, tensors = read_metadata(folder), {}
    for index, place in metadata.storage_data.items():
        entry = metadata.state_dict_metadata[index.fqn]
        is_state = index.fqn.startswith(("optimizer.", "rng_state"))
        wanted = index.fqn.startswith(prefix) if prefix else not is_state
        if not wanted or not isinstance(entry, TensorStorageMetadata):
            continue
        with (folder / place.relative_path).open("rb") as file:
            file.seek(place.offset)
            part = torch.load(io.BytesIO(file.read(place.length)))
        whole = tensors.setdefault(index.fqn, torch.empty(entry.size, dtype=entry.properties.dtype))
        whole[tuple(slice(a, a + n) for a, n in zip(index.offset, part.shape, strict=True))] = part
    return tensors
