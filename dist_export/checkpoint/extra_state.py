"""One layer's ``_extra_state``: TransformerEngine's FP8 state and ModelOpt's quantiser properties, of every release.

Source: `get_extra_state` of TransformerEngine 0.1 to 2.18 (pytorch/module.py, module/base.py) and
`_modelopt_get_extra_state` of ModelOpt 0.29 to 0.47 (torch/opt/plugins/megatron.py), which keeps TransformerEngine's
state under ``extra_state``.

    0.1, 0.2     list of ten, or None          0.12 to 1.13  io.BytesIO of torch.save(dict or None)
    0.3 to 0.5   dict, or None                 1.14          bytes in a uint8 tensor: pickled dict
    0.6 to 0.11  uint8: pickled dict or None   2.0 to 2.3    the same with the recipe; without FP8 a pickled None
                                               2.4 on        the same; without FP8 an empty tensor
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from msgspec import Struct

from dist_export.checkpoint.modelopt_files import MODELOPT_KEY
from dist_export.checkpoint.pickles import Record
from dist_export.checkpoint.saved_bytes import SavedBytes, read_bytes
from dist_export.errors import ExportError

Float32 = npt.NDArray[np.float32]

_LIST_LENGTH = 10
_MOST_NESTED = 6  # a list in a record, bytes in it, ModelOpt's dict, TransformerEngine's bytes in that
_NEWER_THAN_2_2 = "backward_override"  # a field of the recipe from TransformerEngine 2.15 on
_OLDER_THAN_2_2 = "interval"  # a field of the recipe up to TransformerEngine 2.1
_RECIPE_FIELDS = ("margin", "amax_history_len", "amax_compute_algo", "fp8_dpa", "fp8_mha", "reduce_amax")


class TeRecipe(Struct, frozen=True):
    """The recipe object in a state of TransformerEngine 2: what the training run was."""

    name: str
    """Class: DelayedScaling, Float8CurrentScaling, MXFP8BlockScaling, …"""
    margin: int | None = None
    amax_history_len: int | None = None
    amax_compute_algo: str | None = None
    fp8_dpa: bool | None = None
    fp8_mha: bool | None = None
    reduce_amax: bool | None = None


class TeState(Struct, frozen=True, eq=False):
    """TransformerEngine's delayed-scaling state of one module. `scale_fwd` multiplies before the cast to FP8."""

    scale_fwd: Float32
    """[num_gemms x (3, of TransformerEngine 0.1 and 0.2: 2)], flat; of a part of a grouped linear [3]."""
    amax_history_fwd: Float32
    """[history length, as scale_fwd]; row 0 belongs to the step in progress."""
    release: str
    """What is known of the TransformerEngine release: "0.1 to 0.2", …, "2.x", "2.0 to 2.1", "2.15 or later"."""
    num_gemms: int | None
    """As the state says it; Megatron writes 1 into the parts of a grouped linear."""
    recipe: TeRecipe | None = None
    whole: Float32 | None = None
    """All of the grouped linear's scales where `scale_fwd` is a view of every G-th of them: [3 x G]."""

    @property
    def interleaved(self) -> bool | None:
        """Whether a grouped linear's scales are kept expert by expert (2.3 on); None where the state does not tell."""
        if not self.release.startswith("2"):
            return False
        return {"2.0 to 2.1": False, "2.15 or later": True}.get(self.release)


class ExtraState(Struct, frozen=True, eq=False):
    """The decoded state of one layer."""

    te: TeState | None = None
    recipe: TeRecipe | None = None
    """Also of runs that keep no scales."""
    without: str = ""
    """Why there is no FP8 state: "None", "empty tensor", "pickled None", "recipe Float8CurrentScaling", …"""
    modelopt: Mapping[str, Any] | None = None
    """ModelOpt's state of the module, plain values and inert stand-ins."""


def decode_extra_state(data: bytes, *, origin: str) -> ExtraState:
    """The state in a checkpoint's record (``torch.save`` of a list of one) or in the bytes of a state tensor.

    `origin` names the record in errors. Raises `ExportError` for bytes that cannot be trusted, are damaged, or hold a
    state of a form that no release writes.
    """
    if not data:
        return ExtraState(without="empty tensor")
    saved = read_bytes(data, origin=origin)
    value = saved.value[0] if isinstance(saved.value, list) and len(saved.value) == 1 else saved.value
    inner = "pickled None" if data.startswith(b"\x80") else "None"
    return _decode(value, saved, inner, 0)


def decode_saved_state(value: object, saved: SavedBytes) -> ExtraState:
    """The state `value` that is part of a larger saved object, as in a legacy rank file."""
    return _decode(value, saved, "None", 0)


def _decode(value: object, saved: SavedBytes, none: str, depth: int) -> ExtraState:
    if depth > _MOST_NESTED:
        raise ExportError(f"{saved.origin}: states are nested in each other deeper than any release writes them")
    if value is None:
        return ExtraState(without=none)
    if isinstance(value, list) and len(value) == _LIST_LENGTH:
        return _from_list(value, saved)
    if isinstance(value, Mapping):
        return _from_dict(value, saved, depth)
    content = saved.content(value, name="_extra_state")
    if content is None:
        raise ExportError(
            f"{saved.origin}: is {_kind(value)}, which no release of TransformerEngine or ModelOpt writes"
        )
    if not content:
        return ExtraState(without="empty tensor")
    inner = read_bytes(content, origin=saved.origin)
    return _decode(inner.value, inner, "pickled None", depth + 1)


def _kind(value: object) -> str:
    return f"an object of {value.kind}" if isinstance(value, Record) else f"a {type(value).__name__}"


def _from_list(items: list[Any], saved: SavedBytes) -> ExtraState:
    scale, history = (_floats(saved, items[i], name) for i, name in enumerate(("scale_fwd", "amax_history_fwd")))
    return ExtraState(te=_checked(TeState(scale, history, "0.1 to 0.2", None), saved))


def _from_dict(state: Mapping[Any, Any], saved: SavedBytes, depth: int) -> ExtraState:
    if MODELOPT_KEY in state or "extra_state" in state:
        inner = _decode(state.get("extra_state"), saved, "None", depth + 1)
        modelopt = state if MODELOPT_KEY in state else None
        return ExtraState(inner.te, inner.recipe, inner.without, modelopt)
    recipe = _recipe(state.get("recipe"))
    if "scale_fwd" in state:
        return ExtraState(te=_from_te(state, recipe, saved), recipe=recipe)
    if "recipe" in state or "extra_fp8_variables" in state or not state:
        return ExtraState(recipe=recipe, without=f"recipe {recipe.name}" if recipe else "no scales in it")
    listed = ", ".join(map(str, list(state)[:5]))
    raise ExportError(f"{saved.origin}: is a dictionary of {listed[:200]}, which is no state of a layer")


def _from_te(state: Mapping[Any, Any], recipe: TeRecipe | None, saved: SavedBytes) -> TeState:
    scale = saved.array(state["scale_fwd"], name="scale_fwd")
    whole = None
    if (
        scale is not None
        and len(scale.strides) == 1
        and scale.strides[0] > 1
        and len(scale.storage) > scale.values.size
    ):
        whole = _float32(scale.storage)
    variables = state.get("extra_fp8_variables")
    count = variables.get("num_gemms") if isinstance(variables, Mapping) else None
    return _checked(
        TeState(
            scale_fwd=_floats(saved, state["scale_fwd"], "scale_fwd"),
            amax_history_fwd=_floats(saved, state.get("amax_history_fwd"), "amax_history_fwd"),
            release=_release(state),
            num_gemms=count if type(count) is int and count > 0 else None,
            recipe=recipe,
            whole=whole,
        ),
        saved,
    )


def _release(state: Mapping[Any, Any]) -> str:
    if "recipe" in state:
        recipe = state["recipe"]
        fields = recipe.state if isinstance(recipe, Record) and isinstance(recipe.state, Mapping) else {}
        if _NEWER_THAN_2_2 in fields:
            return "2.15 or later"
        return "2.0 to 2.1" if _OLDER_THAN_2_2 in fields else "2.x"
    if "scale_inv_fwd" not in state:
        return "0.3 to 0.7"
    return "0.8 to 1.5" if "global_fp8_buffer" in state else "1.x"


def _checked(state: TeState, saved: SavedBytes) -> TeState:
    scale, history = state.scale_fwd, state.amax_history_fwd
    if scale.ndim != 1 or not scale.size or history.ndim != 2 or history.shape[1] != scale.size:
        raise ExportError(
            f"{saved.origin}: scale_fwd of shape {list(scale.shape)} and amax_history_fwd of shape "
            f"{list(history.shape)} do not belong together"
        )
    return state


def _floats(saved: SavedBytes, value: object, name: str) -> Float32:
    if isinstance(value, list):  # as `rank_extra_states` has it
        try:
            return _float32(np.array(value, np.float32))
        except (TypeError, ValueError):
            raise ExportError(f"{saved.origin}: {name} is a list of other than numbers, expected a tensor") from None
    found = saved.array(value, name=name)
    if found is None:
        raise ExportError(f"{saved.origin}: {name} is {_kind(value)}, expected a tensor")
    if found.values.dtype != np.float32:
        raise ExportError(f"{saved.origin}: {name} is of {found.values.dtype}, expected float32")
    return _float32(found.values)


def _float32(values: npt.NDArray[Any]) -> Float32:
    copied = np.array(values, np.float32)
    copied.flags.writeable = False
    return copied


def _recipe(value: object) -> TeRecipe | None:
    if not isinstance(value, Record):
        return None
    found = {name: value.get(name) for name in _RECIPE_FIELDS}
    plain = {name: each for name, each in found.items() if isinstance(each, int | str)}
    return TeRecipe(value.kind.rpartition(".")[2], **plain)  # type: ignore[arg-type]
