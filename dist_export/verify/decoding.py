"""Quantised weights turned back into numbers, so that what computes plain models can run a quantised export.

Only weights: activations and the KV cache are not rounded as an engine would. How a weight is stored is told by its
element type and by the tensors beside it, whose names are TensorRT-LLM's, ModelOpt's or compressed-tensors'.

Importing this module imports torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from msgspec import Struct, field

from dist_export.errors import ExportError

Shape = tuple[int, ...]

SCALES = ("weights_scaling_factor", "per_channel_scale", "weight_scale")
SECOND = ("weights_scaling_factor_2", "weight_scale_2")
RECIPROCAL = ("weight_global_scale",)
FACTORS = ("prequant_scaling_factor", "pre_quant_scale")
DROPPED = (
    *("activation_scaling_factor", "input_scale", "input_global_scale", "weight_shape"),
    *("k_cache_scaling_factor", "v_cache_scaling_factor", "kv_cache_scaling_factor", "k_scale", "v_scale"),
)
"""Of activations and of the KV cache."""
PACKED = "weight_packed"
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_BESIDE = {*SCALES, *SECOND, *RECIPROCAL, *FACTORS, *DROPPED}


def decode(
    codes: torch.Tensor,
    scale: torch.Tensor,
    *,
    second: torch.Tensor | None = None,
    factor: torch.Tensor | None = None,
) -> torch.Tensor:
    """float32 weights ``[..., out, in]`` that the codes stand for, for activations that no factor is applied to.

    `scale` is of the whole weight, its rows or its blocks of columns; `second` multiplies block scales; `factor` is
    what activations would be multiplied by, one per column.
    """
    values, shape = _values(codes, scale), _shape(codes, scale)
    spread = scale.float()
    if second is not None and scale.dtype is torch.float8_e4m3fn:
        spread = spread * second.float().reshape(-1, *(1,) * (spread.dim() - 1 if second.numel() > 1 else 0))
    if spread.numel() == 1:
        spread = spread.reshape(())
    elif spread.dim() == len(shape) and spread.shape[-1] > 1:
        spread = spread.repeat_interleave(shape[-1] // spread.shape[-1], -1)
    elif spread.shape == shape[:-1]:
        spread = spread[..., None]
    elif len(shape) == 3 and spread.shape[0] == shape[0] and spread.numel() == shape[0]:
        spread = spread.reshape(-1, 1, 1)  # one per expert
    values = values * spread
    return values if factor is None else values * factor.float().unsqueeze(-2)


def _shape(codes: torch.Tensor, scale: torch.Tensor) -> Shape:
    return decoded_shape(tuple(codes.shape), codes.dtype, tuple(scale.shape), scale.dtype)


def decoded_shape(shape: Shape, dtype: torch.dtype, scale_shape: Shape, scale_dtype: torch.dtype) -> Shape:
    """The shape of the weights behind codes of `shape`."""
    *rest, rows, columns = shape
    if dtype is torch.int32:
        return (*rest, rows, columns * 8)
    if dtype is torch.uint8 and scale_dtype is torch.float8_e4m3fn:
        return (*rest, rows, columns * 2)
    if dtype in (torch.int8, torch.uint8) and len(scale_shape) == len(shape) and scale_shape[-2] == 2 * rows:
        return (*rest, rows * 2, columns)
    return shape


def _values(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    if codes.dtype is torch.int32:  # eight columns per word, as code + 8
        shifts = torch.arange(0, 32, 4)
        return (((codes[..., None] >> shifts) & 15) - 8).flatten(-2).float()
    shape = _shape(codes, scale)
    if shape[-1] != codes.shape[-1]:  # two columns per byte, even column low
        nibbles = torch.stack((codes & 15, codes >> 4), -1).flatten(-2).long()
        table = torch.tensor((*E2M1, *(-each for each in E2M1)))
        return table[nibbles]
    if shape[-2] != codes.shape[-2]:  # two rows per byte, even row low
        wide = codes.to(torch.int16) & 255
        nibbles = torch.stack((wide & 15, wide >> 4), -2).flatten(-3, -2)
        return torch.where(nibbles > 7, nibbles - 16, nibbles).float()
    return codes.float()


class DecodedFile(Struct, frozen=True):
    """A safetensors handle whose quantised weights look like plain ones of `dtype`."""

    handle: Any
    dtype: str
    """As safetensors spells it: BF16."""
    _names: dict[str, str] = field(default_factory=dict)
    """Name of a weight -> name of the stored tensor."""

    def __post_init__(self) -> None:
        for name in self.handle.keys():  # noqa: SIM118
            head, _, last = name.rpartition(".")
            if last not in _BESIDE:
                self._names[f"{head}.weight" if last == PACKED else name] = name

    def keys(self) -> Iterable[str]:
        """Names of weights and of what is not quantised."""
        return self._names.keys()

    def get_tensor(self, name: str) -> torch.Tensor:
        """A tensor, decoded where it is quantised."""
        tensor: torch.Tensor = self.handle.get_tensor(self._names[name])
        scale = self._beside(name, SCALES)
        if scale is None:
            return tensor
        second, reciprocal = self._beside(name, SECOND), self._beside(name, RECIPROCAL)
        second = 1 / reciprocal if reciprocal is not None else second
        return decode(tensor, scale, second=second, factor=self._beside(name, FACTORS))

    def get_slice(self, name: str) -> DecodedSlice:
        """Shape and element type of a tensor, and its parts."""
        stored = self.handle.get_slice(self._names[name])
        scale = self._find(name, SCALES)
        if scale is None:
            return DecodedSlice(self, name, tuple(stored.get_shape()), stored.get_dtype())
        beside = self.handle.get_slice(scale)
        types = (_TYPES.get(stored.get_dtype(), torch.float32), _TYPES.get(beside.get_dtype(), torch.float32))
        shape = decoded_shape(tuple(stored.get_shape()), types[0], tuple(beside.get_shape()), types[1])
        return DecodedSlice(self, name, shape, self.dtype)

    def _find(self, name: str, kinds: Iterable[str]) -> str | None:
        head, _, last = name.rpartition(".")
        stored = set(self.handle.keys())
        return next((f"{head}.{kind}" for kind in kinds if last == "weight" and f"{head}.{kind}" in stored), None)

    def _beside(self, name: str, kinds: Iterable[str]) -> torch.Tensor | None:
        found = self._find(name, kinds)
        return None if found is None else self.handle.get_tensor(found)


_TYPES = {"U8": torch.uint8, "I8": torch.int8, "I32": torch.int32, "F8_E4M3": torch.float8_e4m3fn}


class DecodedSlice(Struct, frozen=True):
    """What ``safe_open().get_slice`` returns, of a `DecodedFile`."""

    file: DecodedFile
    name: str
    shape: Shape
    dtype: str

    def get_shape(self) -> Shape:
        """That of the weights."""
        return self.shape

    def get_dtype(self) -> str:
        """That of the model."""
        return self.dtype

    def __getitem__(self, index: Any) -> torch.Tensor:
        part: torch.Tensor = self.file.get_tensor(self.name)[index]
        return part


def decoded_state(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a Hugging Face folder, quantised weights decoded. `ExportError` for files that cannot be read."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise ExportError("quantised exports are decoded with safetensors; run: pip install safetensors") from error
    state: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, "pt") as handle:
                decoded = DecodedFile(handle, "F32")
                state |= {name: decoded.get_tensor(name) for name in decoded.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise ExportError(f"{path}: {error}") from error
    return state


def is_quantised(folder: Path) -> bool:
    """Whether config.json of a Hugging Face folder says that its weights are quantised."""
    try:
        content = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise ExportError(f"{folder / 'config.json'}: cannot be read: {error}") from error
    return isinstance(content, dict) and bool(content.get("quantization_config"))
