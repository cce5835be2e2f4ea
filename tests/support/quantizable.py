"""Small checkpoints to quantise: Llama- and Mixtral-style weights with FP8 states or ModelOpt's quantisers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dist_export import api
from dist_export.api import Source
from dist_export.quantization import QuantizationOptions
from dist_export.runtime.group import Group
from dist_export.session import ExportSession, RunOptions
from dist_export.targets.huggingface.target import HuggingFaceOptions
from dist_export.targets.trtllm.target import TrtllmOptions
from support.quantizer_states import modelopt_state, properties
from support.small_models import LLAMA, SmallModel, small_model
from support.torch_dist import Chunks, write_torch_dist

E4M3, E2M1 = (4, 3), (2, 1)
ATTENTION = ("self_attention.linear_qkv", "self_attention.linear_proj")
MLP = ("mlp.linear_fc1", "mlp.linear_fc2")
_SIZES = {"hidden_size": 64, "ffn_hidden_size": 128, "kv_channels": 16, "padded_vocab_size": 64}


@dataclass
class Quantizable:
    """Tensors and objects of a checkpoint, by their global names."""

    args: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    objects: dict[str, Any] = field(default_factory=dict)

    def weight(self, module: str) -> torch.Tensor:
        """The weight of a linear: ``0.mlp.linear_fc1``."""
        return self.tensors[f"decoder.layers.{module}.weight"]

    @property
    def linears(self) -> list[str]:
        """All linears, without ``decoder.layers.``."""
        head, last = "decoder.layers.", ".weight"
        names = [n.removeprefix(head).removesuffix(last) for n in self.tensors if n.endswith(last)]
        return [name for name in names if ".linear_" in name and name[0].isdigit()]

    def te(self, state_of: Callable[[str], Any]) -> Quantizable:
        """With the state that `state_of` gives of every linear."""
        for name in self.linears:
            self.objects[f"decoder.layers.{name}._extra_state/shard_0_1"] = [state_of(name)]
        return self

    def modelopt(self, name: str, **quantizers: Any) -> Quantizable:
        """With ModelOpt's state of one linear."""
        known = {key: value for key, value in quantizers.items() if value is not None}
        self.objects[f"decoder.layers.{name}._extra_state/shard_0_1"] = [modelopt_state(known)]
        return self

    def amax(self, name: str, quantizer: str, value: float | torch.Tensor, *, quantity: str = "_amax") -> None:
        """A quantiser's tensor."""
        tensor = value if isinstance(value, torch.Tensor) else torch.tensor([value])
        self.tensors[f"decoder.layers.{name}.{quantizer}.{quantity}"] = tensor

    def fp8(self, inputs: Callable[[str], float | None]) -> Quantizable:
        """As ModelOpt's FP8_DEFAULT_CFG has it; `inputs` gives the amax of each linear's input (None: it has none)."""
        for name in self.linears:
            self.modelopt(name, weight_quantizer=properties(E4M3), input_quantizer=properties(E4M3))
            self.amax(name, "weight_quantizer", self.weight(name).abs().max().reshape(1))
            found = inputs(name)
            if found is not None:
                self.amax(name, "input_quantizer", found)
        return self

    def write(self, folder: Path, chunks: Chunks | None = None) -> Path:
        """As a checkpoint's iteration."""
        return write_torch_dist(
            folder / "iter_0000010", self.tensors, args=self.args, chunks=chunks, extra_objects=self.objects
        )


def llama(num_layers: int = 2, **args: Any) -> Quantizable:
    """A dense model with a key per layer. The parts of fused weights differ in size, so that merged amax shows."""
    model = small_model(LLAMA, num_layers=num_layers, scale=0.1, **{**_SIZES, **args})
    tensors = model.per_layer()
    for layer in range(num_layers):
        fc1 = tensors[f"decoder.layers.{layer}.mlp.linear_fc1.weight"]
        fc1[: len(fc1) // 2] *= 1.7
        tensors[f"decoder.layers.{layer}.self_attention.linear_qkv.weight"][:16] *= 1.3
    return Quantizable(model.args, tensors)


def mixtral(num_experts: int = 4, **args: Any) -> Quantizable:
    """Experts in every layer, a key for each of them."""
    sizes = {**_SIZES, "num_layers": 2, "num_experts": num_experts, "moe_router_topk": 2, "moe_ffn_hidden_size": 128}
    dense: SmallModel = small_model(LLAMA, scale=0.1, **{**sizes, "moe_layer_freq": 1, **args})
    tensors, generator = {}, torch.Generator().manual_seed(3)
    for name, tensor in dense.per_layer().items():
        if ".mlp.linear_fc1.layer_norm" in name:
            tensors[name.replace("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight")] = tensor
        elif ".mlp.linear_" in name:
            head, _, last = name.partition("mlp.")
            for expert in range(num_experts):
                values = torch.randn(tensor.shape, generator=generator) * 0.1 * (1 + expert / 8)
                tensors[f"{head}mlp.experts.experts.{expert}.{last}"] = values.to(tensor.dtype)
        else:
            tensors[name] = tensor
    for layer in range(2):
        router = torch.randn((num_experts, 64), generator=generator)
        tensors[f"decoder.layers.{layer}.mlp.router.weight"] = router
    return Quantizable(dense.args, tensors)


def export_quantized(
    checkpoint: Path,
    output: Path,
    target: TrtllmOptions | HuggingFaceOptions | None = None,
    *,
    calibration: Path | None = None,
    **quantization: Any,
) -> Path:
    """Export in this process; `quantization` are `QuantizationOptions`."""
    options = QuantizationOptions(**quantization)
    model = api.open_model(Source(checkpoint=checkpoint, quantization=options, calibration=calibration))
    job = api.plan_job(model, (target or TrtllmOptions(),))
    request = {"iteration": None, "family": None, "overrides": {}}
    with Group.single() as group:
        ExportSession(model.checkpoint, job, RunOptions(output=output), group, request).run()
    return output


def fp8_codes(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """E4M3 of weights with one scale (or one per row), by definition."""
    return (weight.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn)


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal in type, shape and bits."""
    bits = [each.contiguous().reshape(-1).view(torch.uint8) for each in (one, other)]
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(*bits)
