"""Layer states as TransformerEngine's and ModelOpt's releases write them, made without either.

Each follows `get_extra_state` of its release line by line; the classes that they pickle exist only while they do.
"""

from __future__ import annotations

import io
import pickle
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from typing import Any, NamedTuple

import torch

RELEASES = ("0.2", "0.3", "0.6", "0.9", "1.0", "1.5", "1.13", "1.14", "2.0", "2.1", "2.3", "2.10", "2.15")
_RECIPES = "transformer_engine.common.recipe"
MEGATRON_RECIPES = (
    "megatron.core.extensions.transformer_engine",
    "megatron.core.transformer.custom_layers.transformer_engine",
)


class FormatHelper(NamedTuple):
    """Stands for ``_FormatHelper``."""

    max_fwd: float
    max_bwd: float


class Format(Enum):
    """Stands for TransformerEngine's."""

    E4M3 = FormatHelper(448, 448)
    HYBRID = FormatHelper(448, 57344)


@contextmanager
def transformer_engine(kind: str, module: str = _RECIPES) -> Iterator[type]:
    """The recipe class `kind` of `module`, and the format beside it, under the names that pickles have for them."""
    recipe = type(kind, (), {"__module__": module, "__qualname__": kind})
    needed = {".".join(name.split(".")[:end]) for name in (module, _RECIPES) for end in range(1, 6)}
    before = {name: sys.modules.get(name) for name in needed}
    names = {"_FormatHelper": FormatHelper, "Format": Format}
    for cls, name in ((FormatHelper, "_FormatHelper"), (Format, "Format")):
        cls.__module__, cls.__qualname__ = _RECIPES, name
    try:
        for name in before:
            sys.modules[name] = types.ModuleType(name)
        for name, cls in names.items():
            setattr(sys.modules[_RECIPES], name, cls)
        setattr(sys.modules[module], kind, recipe)
        yield recipe
    finally:
        for name, old in before.items():
            if old is None:
                del sys.modules[name]
            else:
                sys.modules[name] = old


def te_state(
    release: str,
    scale: torch.Tensor | None,
    history: torch.Tensor | None = None,
    *,
    num_gemms: int = 1,
    recipe: str = "DelayedScaling",
    module: str = _RECIPES,
) -> Any:
    """What ``get_extra_state`` of a TransformerEngine release returns; without `scale` that of a layer not in FP8."""
    major, minor = map(int, release.split("."))
    version = (major, minor)
    if scale is None and recipe == "DelayedScaling":
        return _without_fp8(version)
    state: dict[str, Any] = {}
    if scale is not None:
        history = torch.zeros(1, len(scale)) if history is None else history
        state = {"scale_fwd": scale, "amax_history_fwd": history}
        state |= {"scale_bwd": torch.ones(2), "amax_history_bwd": torch.zeros(1, 2)}
    if version <= (0, 2):
        return [*state.values(), {"FWD_0": [torch.ones(3)]}, True, 0, 0, 1, 1]
    if version < (1, 6):
        state["global_fp8_buffer"] = {"FWD_0": [torch.ones(3)]}
    if (0, 8) <= version < (2, 0) and scale is not None:
        state |= {"scale_inv_fwd": 1 / scale, "scale_inv_bwd": torch.ones(2)}
    state["extra_fp8_variables"] = {"num_gemms": num_gemms, "fp8_checkpoint": True, "fp8_max_fwd": 448.0}
    if version == (0, 3):
        return state
    if (0, 12) <= version < (1, 14):
        return _saved(state)
    if version < (2, 0):
        return _pickled(state)
    with transformer_engine(recipe, module) as kind:
        state["recipe"] = _recipe(kind, version, 1 if history is None else len(history))
        return _pickled(state)


def _recipe(kind: type, version: tuple[int, int], length: int) -> object:
    recipe = kind()
    recipe.__dict__.update(margin=0, fp8_format=Format.HYBRID)
    if kind.__name__.endswith("DelayedScaling"):
        recipe.__dict__.update(amax_history_len=length, amax_compute_algo="most_recent", reduce_amax=True)
        recipe.__dict__.update(scaling_factor_compute_algo=None, fp8_dpa=False, fp8_mha=False)
    if version <= (2, 1):
        recipe.__dict__["interval"] = 1
    if version >= (2, 15):
        recipe.__dict__["backward_override"] = None
    return recipe


def _without_fp8(version: tuple[int, int]) -> Any:
    if version < (0, 6):
        return None
    if version < (0, 12) or (1, 14) <= version < (2, 4):
        return _pickled(None)
    return _saved(None) if version < (1, 14) else torch.empty(0, dtype=torch.uint8)


def _pickled(state: object) -> torch.Tensor:
    return torch.frombuffer(bytearray(pickle.dumps(state)), dtype=torch.uint8)


def _saved(state: object) -> io.BytesIO:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer


def split_state(release: str, scale: torch.Tensor, history: torch.Tensor) -> list[Any]:
    """What Megatron-Core from 0.11 on makes of a grouped linear's state: one for each of its experts.

    `_split_extra_state` of megatron/core/extensions/transformer_engine.py.
    """
    count = len(scale) // 3
    return [
        te_state(release, scale.view(3, -1)[:, expert], history.view(len(history), 3, -1)[:, :, expert], num_gemms=1)
        for expert in range(count)
    ]


def record(state: object) -> bytes:
    """The record of a sharded object."""
    buffer = io.BytesIO()
    torch.save([state], buffer)
    return buffer.getvalue()


def modelopt_state(quantizers: dict[str, Any], *, te: object = None, zipped: bool = True, **more: Any) -> torch.Tensor:
    """``get_extra_state`` of a module that ModelOpt quantised: a torch.save zip from 0.41 on, a pickle before."""
    state: dict[str, Any] = {} if te is None else {"extra_state": te}
    state |= {"modelopt_quantizer_state": quantizers, **more}
    if zipped:
        return torch.frombuffer(bytearray(_saved(state).getvalue()), dtype=torch.uint8)
    return _pickled(state)


def properties(num_bits: Any, *, disabled: bool = False, buffers: tuple[str, ...] = ("_amax",), **more: Any) -> Any:
    """A quantiser's own state, as `get_modelopt_state` gives it."""
    shapes = {name: {"shape": torch.Size([4]), "dtype": torch.bfloat16} for name in buffers}
    plain = {"_axis": None, "_block_sizes": None, "_fake_quant": True, "_dynamic": False, "_unsigned": False}
    given = {f"_{name}": value for name, value in more.items()}
    metadata = {"_pytorch_state_metadata": {"params": {}, "buffers": shapes}}
    return {**plain, "_num_bits": num_bits, "_disabled": disabled, **given, **metadata}
