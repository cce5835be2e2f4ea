"""The rank files of a TensorRT-LLM checkpoint, opened and checked as the loader of an engine would."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msgspec import Struct

from dist_export.errors import ExportError, Faults
from dist_export.verify.trtllm_engine import SAFETENSORS_DTYPES, EngineConfig, Shape
from dist_export.verify.trtllm_experts import ROUTER, SHARED_EXPERT_IN_MLP

if TYPE_CHECKING:
    import torch

ROTARY_TABLES = {"rotary_inv_freq", "embed_positions", "embed_positions_for_gpt_attention"}
"""Some converters store these; the engine computes its own from config.json."""


class RankFile(Struct, frozen=True):
    """One rank's safetensors file, opened; tensors are read when asked for."""

    path: Path
    handle: Any

    def load(self, name: str) -> torch.Tensor:
        """A tensor as stored."""
        tensor: torch.Tensor = self.handle.get_tensor(name)
        return tensor

    def load_one(self, name: str, number: int) -> torch.Tensor:
        """One expert's part of a stacked tensor."""
        tensor: torch.Tensor = self.handle.get_slice(name)[number]
        return tensor

    @property
    def shared_in_mlp(self) -> bool:
        """Whether the shared expert is where 0.16 and later have it."""
        return any(name.endswith(SHARED_EXPERT_IN_MLP) for name in set(self.handle.keys()))

    @property
    def experts_in_moe(self) -> bool:
        """Whether routed experts are a module beside the shared ones, as of DeepSeek-V2 in 0.15."""
        return any(".mlp.moe." in name for name in set(self.handle.keys()))

    def faults(self, expected: Mapping[str, Shape], dtype: str) -> Iterator[str]:
        """What the engine's loader would refuse or warn about."""
        names = set(self.handle.keys()) - ROTARY_TABLES
        file = self.path.name
        yield from (f"{file}: {name} is missing" for name in sorted(expected.keys() - names))
        yield from (f"{file}: {name} is not a tensor of this rank" for name in sorted(names - expected.keys()))
        for name in sorted(expected.keys() & names):
            part = self.handle.get_slice(name)
            found = (tuple(part.get_shape()), part.get_dtype())
            kind = "F32" if name.endswith(ROUTER.removeprefix("mlp")) else SAFETENSORS_DTYPES[dtype]
            if found != (expected[name], kind):
                wanted = f"{kind} {list(expected[name])}"
                yield f"{file}: {name} is {found[1]} {list(found[0])}, expected {wanted}"


def open_ranks(folder: Path, *, decoded: bool = False) -> tuple[EngineConfig, list[RankFile]]:
    """config.json and the files of all ranks, tp fastest (mapping.py); every tensor's name, shape and dtype is checked.

    With `decoded` quantised weights look like plain ones.

    Raises one `ExportError` with every fault.
    """
    config = read_config(folder, decoded=decoded)
    faults = Faults(f"{folder}: not what TensorRT-LLM would load by this config.json")
    ranks = []
    for rank in range(config.tp_size * config.pp_size):
        file = _open(folder / f"rank{rank}.safetensors", faults)
        if file is not None and decoded:
            from dist_export.verify.decoding import DecodedFile

            file = RankFile(file.path, DecodedFile(file.handle, SAFETENSORS_DTYPES[str(config.raw["dtype"])]))
        if file is not None:
            shapes = config.shapes(rank // config.tp_size, shared_in_mlp=file.shared_in_mlp)
            faults.extend(file.faults(shapes, str(config.raw["dtype"])))
            ranks.append(file)
    faults.raise_if_any()
    return config, ranks


def read_config(folder: Path, *, decoded: bool = False) -> EngineConfig:
    """config.json of a TensorRT-LLM checkpoint; `ExportError` when it is none or asks for what is not interpreted."""
    path = folder / "config.json"
    try:
        raw = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ExportError(f"{path}: cannot be read: {error}") from error
    if not isinstance(raw, dict) or not isinstance(raw.get("mapping"), dict):
        raise ExportError(f"{path}: has no mapping; it is not of a TensorRT-LLM checkpoint")
    if decoded:
        raw.pop("quantization", None)
    try:
        return EngineConfig(raw)
    except KeyError as error:
        raise ExportError(f"{path}: has no {error.args[0]}") from error


def _open(path: Path, faults: Faults) -> RankFile | None:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise ExportError("logits of an export are computed with safetensors; run: pip install safetensors") from error
    try:
        return RankFile(path, safe_open(path, "pt"))
    except (OSError, SafetensorError) as error:
        faults.add(f"{path.name}: {error}")
        return None
