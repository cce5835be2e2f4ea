"""The models that ModelOpt quantised (tests/conformance/llama_quantized.tar.xz), and the same in other layouts."""

from __future__ import annotations

import io
import shutil
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from msgspec.structs import asdict

from dist_export import api
from dist_export.api import Source
from dist_export.quantization import QuantizationOptions
from dist_export.runtime.group import Group
from dist_export.session import ExportSession, RunOptions
from dist_export.targets.huggingface.target import HuggingFaceOptions
from dist_export.targets.trtllm.target import TrtllmOptions
from support.torch_dist import Chunk, read_metadata, write_torch_dist

CONFORMANCE = Path(__file__).parents[1] / "conformance"
SCHEMES = {"fp8": 2, "int8_sq": 1, "int4_awq": 2, "nvfp4": 2}
"""Scheme -> tp of the training run."""


def unpack(folder: Path) -> dict[str, Path]:
    """Scheme -> its checkpoint below `folder`."""
    with tarfile.open(CONFORMANCE / "llama_quantized.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    found = {scheme: folder / f"llama_{scheme}_core_0_16_tp{tp}" for scheme, tp in SCHEMES.items()}
    for path in (folder, *folder.rglob("*")):
        path.chmod(path.stat().st_mode | 0o200)
    return found


def read(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any], dict[str, int]]:
    """(tensors, objects, chunks of each tensor) of an iteration's ``torch_dist`` folder, by torch's own means."""
    metadata = read_metadata(folder)
    tensors: dict[str, torch.Tensor] = {}
    objects, num_chunks = {}, {}
    for name, entry in metadata.state_dict_metadata.items():
        if hasattr(entry, "chunks"):
            tensors[name] = torch.empty(entry.size, dtype=entry.properties.dtype)
            num_chunks[name] = len(entry.chunks)
    for index, place in metadata.storage_data.items():
        with (folder / place.relative_path).open("rb") as file:
            file.seek(place.offset)
            value = torch.load(io.BytesIO(file.read(place.length)), weights_only=False)
        if index.fqn in tensors:
            box = tuple(slice(start, start + size) for start, size in zip(index.offset, value.shape, strict=True))
            tensors[index.fqn][box] = value
        else:
            objects[index.fqn] = value
    return tensors, objects, num_chunks


def reshard(
    checkpoint: Path, target: Path, *, tp: int, edit: Callable[[dict[str, torch.Tensor]], object] = lambda tensors: None
) -> Path:
    """The same model as a training run of another tp would have saved it, at `target` (a --save folder).

    `edit` may change the tensors, which it sees in the order of tp 1.
    """
    source, folder = checkpoint / "iter_0000010", target / "iter_0000010"
    tensors, objects, num_chunks = read(source)
    for name, tensor in tensors.items():
        if _interleaved(name, tensor):
            tensors[name] = _from_ranks(tensor, num_chunks[name])
    edit(tensors)
    tensors = {n: _to_ranks(t, tp) if _interleaved(n, t) else t for n, t in tensors.items()}

    def chunks(name: str, tensor: torch.Tensor) -> Iterator[Chunk]:
        dim = _tensor_parallel_dim(name, tensor)
        parts = 1 if dim is None else min(tp, tensor.shape[dim])
        for rank in range(parts):
            start, size = [0] * tensor.dim(), list(tensor.shape)
            if dim is not None:
                size[dim] //= parts
                start[dim] = rank * size[dim]
            yield rank, tuple(start), tuple(size)

    write_torch_dist(folder, tensors, args=None, chunks=chunks, extra_objects=objects)
    shutil.copyfile(source / "common.pt", folder / "common.pt")
    shutil.copytree(source / "modelopt_state", folder / "modelopt_state")
    (target / "latest_checkpointed_iteration.txt").write_text("10")
    return target


def _interleaved(name: str, tensor: torch.Tensor) -> bool:
    """Whether ModelOpt saves the rows as the training ranks held them: rank 0's gate, its up, rank 1's gate, …"""
    return name.endswith("linear_fc1.weight_quantizer._amax") and tensor.numel() > 1


def _to_ranks(tensor: torch.Tensor, tp: int) -> torch.Tensor:
    """From the order gate, up to the order of training ranks."""
    return tensor.reshape(2, tp, tensor.shape[0] // (2 * tp), -1).transpose(0, 1).reshape(tensor.shape).clone()


def _from_ranks(tensor: torch.Tensor, tp: int) -> torch.Tensor:
    """And back."""
    return tensor.reshape(tp, 2, tensor.shape[0] // (2 * tp), -1).transpose(0, 1).reshape(tensor.shape).clone()


def _tensor_parallel_dim(name: str, tensor: torch.Tensor) -> int | None:
    row_parallel = ".linear_proj." in name or ".linear_fc2." in name
    if tensor.numel() == 1 or "layer_norm" in name or "layernorm" in name:
        return None
    if name.endswith("_pre_quant_scale"):
        return 0 if row_parallel else None
    if name.endswith("_amax") and row_parallel:
        return 1 if tensor.shape[1] > 1 else None
    return 1 if row_parallel else 0


def export_here(
    checkpoint: Path,
    output: Path,
    *targets: TrtllmOptions | HuggingFaceOptions,
    quantization: QuantizationOptions | None = None,
    **options: Any,
) -> Path:
    """Export in this process, which has torch already."""
    quantization = quantization or QuantizationOptions()
    model = api.open_model(Source(checkpoint=checkpoint, quantization=quantization))
    job = api.plan_job(model, targets or (TrtllmOptions(),))
    request = {"iteration": None, "family": None, "overrides": {}, "quantization": asdict(quantization)}
    with Group.single() as group:
        ExportSession(model.checkpoint, job, RunOptions(output=output, **options), group, request).run()
    return output
