"""Record what a right export of a quantised model is, as hashes, from the files that ModelOpt itself wrote.

    python tests/conformance/record_quantized.py expected_quantized/fp8.json TENSORRT_LLM [HUGGING_FACE]

TENSORRT_LLM holds one folder per layout (`tp2pp1/`), HUGGING_FACE is one folder; both are ModelOpt 0.47's export of
a checkpoint in checkpoints/llama_quantized.tar.xz (a Megatron-Core 0.16 model quantised in place). The JSON has

    {"layouts": {"tp2pp1": {"quantization": {...}, "ranks": [{NAME: {"dtype", "shape", "sha256"}}]}},
     "huggingface": {"tensors": {...}, "quantization_config": {...}, "hf_quant_config": {...}}}

Two things are not taken as ModelOpt has them:

- FP8 codes for Hugging Face. ModelOpt divides by the scale in bf16 there and in float32 for TensorRT-LLM, so a few
  per cent of the codes differ by a step. Expected is the float32 quotient for both: the rows of the TensorRT-LLM
  tensors of tp 1 whose scale is the same.
- The vocabulary with INT4. ModelOpt pads it to a multiple of 64 x tp, which TensorRT-LLM does not need: expected are
  the true rows, divided among the ranks.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from record import _dump
from safetensors import safe_open

Tensors = dict[str, torch.Tensor]
VOCABULARY = 250
TABLES = ("lm_head.weight", "transformer.vocab_embedding.weight")
FUSED = {  # Hugging Face weight -> tensor of TensorRT-LLM and its rows
    "self_attn.q_proj": ("attention.qkv", 0, 256),
    "self_attn.k_proj": ("attention.qkv", 256, 320),
    "self_attn.v_proj": ("attention.qkv", 320, 384),
    "self_attn.o_proj": ("attention.dense", 0, 256),
    "mlp.gate_proj": ("mlp.fc", 0, 256),
    "mlp.up_proj": ("mlp.gate", 0, 256),
    "mlp.down_proj": ("mlp.proj", 0, 256),
}


def load(path: Path) -> Tensors:
    """All tensors of a file."""
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def hashed(tensors: Tensors) -> dict[str, dict[str, Any]]:
    """dtype, shape and SHA-256 of the raw bytes of every tensor, by name."""
    names = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float8_e4m3fn: "F8_E4M3", torch.int8: "I8"}
    names[torch.uint8] = "U8"
    return {
        name: {
            "dtype": names[tensor.dtype],
            "shape": list(tensor.shape),
            "sha256": hashlib.sha256(tensor.reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()).hexdigest(),
        }
        for name, tensor in sorted(tensors.items())
    }


def layout(folder: Path) -> tuple[dict[str, Any], list[Tensors]]:
    """The quantisation table and every rank's tensors, the vocabulary without padding."""
    config = json.loads((folder / "config.json").read_text())
    ranks = [load(folder / f"rank{rank}.safetensors") for rank in range(config["mapping"]["world_size"])]
    for name in TABLES:
        whole = torch.cat([tensors[name] for tensors in ranks])[:VOCABULARY]
        for tensors, part in zip(ranks, whole.chunk(len(ranks)), strict=True):
            tensors[name] = part
    return config["quantization"], ranks


def fp32_codes(hugging_face: Tensors, rank: Tensors) -> None:
    """Replace FP8 codes by those of the float32 quotient."""
    for name, tensor in hugging_face.items():
        if tensor.dtype is not torch.float8_e4m3fn or tensor.shape[-1] == 16:
            continue
        _, _, layer, part = name.removesuffix(".weight").split(".", 3)
        source, first, end = FUSED[part]
        source = f"transformer.layers.{layer}.{source}"
        scale = hugging_face[name.removesuffix("weight") + "weight_scale"]
        assert scale == rank[f"{source}.weights_scaling_factor"], name
        hugging_face[name] = rank[f"{source}.weight"][first:end]


def main() -> None:
    """Write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("json", type=Path)
    parser.add_argument("tensorrt_llm", type=Path)
    parser.add_argument("hugging_face", type=Path, nargs="?")
    arguments = parser.parse_args()
    layouts = {path.name: layout(path) for path in sorted(arguments.tensorrt_llm.iterdir())}
    expected: dict[str, Any] = {
        "layouts": {name: {"quantization": q, "ranks": list(map(hashed, r))} for name, (q, r) in layouts.items()}
    }
    if arguments.hugging_face is not None:
        tensors = load(arguments.hugging_face / "model.safetensors")
        fp32_codes(tensors, layouts["tp1pp1"][1][0])
        config = json.loads((arguments.hugging_face / "config.json").read_text())
        expected["huggingface"] = {
            "tensors": hashed(tensors),
            "quantization_config": config["quantization_config"],
            "hf_quant_config": json.loads((arguments.hugging_face / "hf_quant_config.json").read_text()),
        }
    arguments.json.write_text(_dump(expected))


if __name__ == "__main__":
    main()
