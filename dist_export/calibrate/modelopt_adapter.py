"""NVIDIA ModelOpt: calibrates the quantisers of a Megatron model and hands their numbers over. Nothing else imports it.

Importing this module imports torch; modelopt is imported when it runs.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from msgspec import Struct
from msgspec.structs import replace

from dist_export.calibrate.layout import BLOCK_COLUMNS
from dist_export.calibrate.places import Piece, Place, pieces_of
from dist_export.calibrate.tensor_parallel_awq import TensorParallelAwq
from dist_export.checkpoint.quantizer_names import Quantity, Quantizer, module_name, quantizer_tensor
from dist_export.errors import ExportError, Faults

INSTALL_HINT = "calibration is done by NVIDIA ModelOpt; run: pip install 'dist-export[modelopt,megatron]'"
CONFIGS: Mapping[str, str] = {
    "fp8": "FP8_DEFAULT_CFG",
    "int8_sq": "INT8_SMOOTHQUANT_CFG",
    "int4_awq": "INT4_AWQ_CFG",
    "nvfp4": "NVFP4_DEFAULT_CFG",
}
"""Scheme -> ModelOpt's configuration (modelopt/torch/quantization/config.py)."""
_SMOOTH = "apply_pre_quant_scale_and_smooth"
_KEPT = {
    Quantizer.WEIGHT: (Quantity.AMAX,),
    Quantizer.INPUT: (Quantity.AMAX, Quantity.PRE_QUANT_SCALE),
}


class Calibrated(Struct, frozen=True):
    """What calibration has found on this rank."""

    pieces: list[Piece]
    """Quantisers' tensors under Megatron's names, shaped as ``torch_dist`` checkpoints have them, on the CPU."""
    version: str
    """ModelOpt's."""


def calibrate(
    model: Any, scheme: str, forward: Callable[[], None], place: Callable[[str], Place], *, tp_group: Any = None
) -> Calibrated:
    """Quantise a Megatron model in place, `forward` running the calibration data through it as often as it is called.

    `model` is the whole one or this rank's part of it (`tp_group`: the ranks that share its layers); `place` tells
    where the weight of a linear lies in the whole one. All ranks call it. Raises `ExportError` when ModelOpt is
    missing, and for linears that it does not calibrate.
    """
    mtq, version = _modelopt()
    linears = {name: module for name, module in model.named_modules() if _is_linear(name, module)}
    shapes = {name: tuple(module.weight.shape) for name, module in linears.items()}
    places = {name: place(name) for name in linears}
    awq = TensorParallelAwq(linears, places, tp_group) if scheme == "int4_awq" and tp_group is not None else None

    def run(_: Any) -> None:
        if awq is not None:
            awq.before_pass()
        forward()
        if awq is not None:
            awq.after_pass()

    _register_own_linears(linears.values())
    _keep_norms_apart(model)
    with torch.no_grad(), _recorded_smoothing(awq) as smoothing:
        mtq.quantize(model, copy.deepcopy(getattr(mtq, CONFIGS[scheme])), run)
    tensors = _tensors(model, shapes, version)
    for name, module in linears.items():
        if id(module) in smoothing:
            rounded = tensors[f"{name}.{Quantizer.INPUT.value}.{Quantity.PRE_QUANT_SCALE.value}"]
            scale = smoothing[id(module)].float().reshape(-1).cpu()
            if not torch.equal(scale.to(rounded.dtype), rounded):
                raise ExportError(f"ModelOpt {version} smooths {name} otherwise than is known; use another release")
            tensors[f"{name}.{Quantizer.INPUT.value}.{Quantity.SMOOTHING.value}"] = scale
    _check(tensors, list(linears), version)
    block, numbers = BLOCK_COLUMNS.get(scheme), [layer.layer_number - 1 for layer in model.decoder.layers]
    pieces = [
        piece
        for name, values in tensors.items()
        for piece in pieces_of(_global(name, numbers), values, places[_module_of(name)], block=block)
    ]
    return Calibrated(pieces, version)


def _register_own_linears(linears: Iterable[Any]) -> None:
    """ModelOpt knows the very classes of linears; ours, derived from them, get the quantisers of what they are."""
    registry: Any = importlib.import_module("modelopt.torch.quantization.nn").QuantModuleRegistry
    plugin: Any = importlib.import_module("modelopt.torch.quantization.plugins.megatron")
    for kind in {type(linear) for linear in linears}:
        if kind not in registry and issubclass(kind, plugin.megatron_parallel.RowParallelLinear):
            registry.register({kind: kind.__name__})(plugin._MegatronRowParallelLinear)


def _keep_norms_apart(model: Any) -> None:
    """ModelOpt has quantisers for norms, too, and takes the maximum of each over all processes where nothing is said of
    their groups: of different layers then, and for ever where stages have different numbers of them."""
    state: Any = importlib.import_module("modelopt.torch.utils.distributed").ParallelState(data_parallel_group=-1)
    for module in model.modules():
        if type(module).__module__.startswith("torch.nn."):
            module._parallel_state = state


def _tensors(model: Any, shapes: Mapping[str, Sequence[int]], version: str) -> dict[str, torch.Tensor]:
    """The tensors of linears' quantisers; an `ExportError` for such as an export would not understand."""
    tensors = {}
    for name, value in model.state_dict().items():
        found = quantizer_tensor(name)
        if found is None or found.quantizer is Quantizer.NORM_INPUT or value is None:
            continue
        module = name.rpartition(f".{found.quantizer.value}")[0]
        if module not in shapes or found.quantity not in _KEPT.get(found.quantizer, ()):
            raise ExportError(f"ModelOpt {version} keeps {name}, of which it is not known what an export does with it")
        tensors[name] = _shaped(value, shapes[module]).cpu()
    return tensors


def _module_of(name: str) -> str:
    """The linear of a quantiser's tensor."""
    return name.rpartition("_quantizer.")[0].rpartition(".")[0]


def _modelopt() -> tuple[Any, str]:
    try:
        version = str(importlib.import_module("modelopt").__version__)
        return importlib.import_module("modelopt.torch.quantization"), version
    except ImportError as error:
        raise ExportError(f"{INSTALL_HINT} ({error})") from error


def _is_linear(name: str, module: Any) -> bool:
    last = name.rpartition(".")[2]
    return name.startswith("decoder.layers.") and last.startswith("linear_") and hasattr(module, "weight")


@contextlib.contextmanager
def _recorded_smoothing(awq: TensorParallelAwq | None) -> Iterator[dict[int, torch.Tensor]]:
    """Module (by id) -> the float32 scale by which ModelOpt smooths its weight; it only keeps it rounded.

    With `awq` it smooths by the scale that the ranks found together."""
    calibration: Any = importlib.import_module("modelopt.torch.quantization.model_calib")
    original = getattr(calibration, _SMOOTH, None)
    if original is None:
        raise ExportError(f"this release of ModelOpt has no {_SMOOTH}; use 0.47")
    recorded: dict[int, torch.Tensor] = {}

    def smooth(linear: Any, pre_quant_scale: torch.Tensor | None = None) -> None:
        if awq is not None:
            together = awq.scale(linear)
            pre_quant_scale = pre_quant_scale if together is None else together
        original(linear, pre_quant_scale)
        if pre_quant_scale is not None:
            recorded[id(linear)] = pre_quant_scale.detach().clone()

    setattr(calibration, _SMOOTH, smooth)
    try:
        yield recorded
    finally:
        setattr(calibration, _SMOOTH, original)


def _shaped(value: torch.Tensor, weight: Sequence[int]) -> torch.Tensor:
    """As ``torch_dist`` has it: one number ``[1]``, rows ``[rows, 1]``, blocks of columns ``[rows, blocks]``."""
    if value.numel() == 1:
        return value.reshape(1)
    if value.dim() == 2 and value.shape[1] == 1 and value.shape[0] > weight[0]:
        return value.reshape(weight[0], -1)
    return value


def _check(tensors: Mapping[str, torch.Tensor], linears: Sequence[str], version: str) -> None:
    faults = Faults(f"ModelOpt {version} has not calibrated the whole model")
    weight = f"{Quantizer.WEIGHT.value}.{Quantity.AMAX.value}"
    dynamic = not any(name.endswith(weight) for name in tensors)
    for linear in linears:
        own = [name for name in tensors if name.startswith(f"{linear}.")]
        if not own or not (dynamic or f"{linear}.{weight}" in own):
            faults.add(f"{linear}: its quantisers have no amax; did any token reach it?")
    for name, value in tensors.items():
        if not bool(torch.isfinite(value).all()) or bool((value < 0).any()):
            faults.add(f"{name}: holds NaN, infinity or numbers below zero")
        elif not bool((value > 0).any()):
            faults.add(f"{name}: is zero; more or other texts are needed")
    faults.raise_if_any()


def _global(name: str, numbers: Sequence[int]) -> str:
    """The name that checkpoints have: layers are numbered over all stages, experts over all ranks."""
    module = module_name(name)
    return str(replace(module, layer=numbers[module.layer]))
