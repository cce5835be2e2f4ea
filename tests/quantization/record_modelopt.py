"""Record what ModelOpt 0.47 writes for small models: run by hand, in an environment with ModelOpt.

    pip install nvidia-modelopt==0.47.0 torch==2.13.0 "transformers==4.57.*" safetensors numpy
    PYTHONPATH=tests python tests/quantization/record_modelopt.py tests/quantization/data

One JSON per scheme: the amax and factors that calibration found, and type, shape and SHA-256 of every tensor that
``export_tensorrt_llm_checkpoint`` and ``export_hf_checkpoint`` write. Megatron's fused linears have one quantiser, so
query, key and value (gate and up) are given one factor and the largest amax before ModelOpt writes the model.
"""

from __future__ import annotations

import copy
import hashlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import torch
from modelopt.torch.export import export_hf_checkpoint, export_tensorrt_llm_checkpoint
from safetensors import safe_open
from support.modelopt_models import DENSE, MOE, Shape, groups, smoothed, transformers_weights
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

RUNS: dict[str, tuple[Shape, str, bool]] = {
    "dense_fp8_kv": (DENSE, "FP8_DEFAULT_CFG", True),
    "dense_fp8_rows": (DENSE, "FP8_PER_CHANNEL_PER_TOKEN_CFG", False),
    "dense_w4a8_awq": (DENSE, "W4A8_AWQ_BETA_CFG", False),
    "moe_fp8": (MOE, "FP8_DEFAULT_CFG", False),
    "moe_nvfp4": (MOE, "NVFP4_DEFAULT_CFG", False),
}


def model_of(shape: Shape) -> Any:
    sizes = {
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.groups,
        "vocab_size": shape.vocab,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
    }
    if shape.num_experts:
        more = {"num_local_experts": shape.num_experts, "num_experts_per_tok": 2, "sliding_window": None}
        config = MixtralConfig(architectures=["MixtralForCausalLM"], **sizes, **more)
        model = MixtralForCausalLM(config)
    else:
        model = LlamaForCausalLM(LlamaConfig(architectures=["LlamaForCausalLM"], **sizes))
    model = model.to(torch.bfloat16).eval()
    model.load_state_dict(transformers_weights(shape))
    return model


def calibrated(shape: Shape, config: str, kv_cache: bool) -> Any:
    settings = copy.deepcopy(getattr(mtq, config))
    if kv_cache:
        settings["quant_cfg"] = settings["quant_cfg"] + copy.deepcopy(mtq.FP8_KV_CFG["quant_cfg"])
    tokens = torch.randint(0, shape.vocab, (4, 64), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        model = mtq.quantize(model_of(shape), settings, lambda each: each(tokens))
    unite(model, shape)
    return model


def unite(model: Any, shape: Shape) -> None:
    """One factor and one amax for the parts of each fused linear."""
    weights = transformers_weights(shape)
    for parts in groups(shape).values():
        linears = [model.get_submodule(part) for part in parts]
        factors = [getattr(linear.input_quantizer, "_pre_quant_scale", None) for linear in linears]
        factor = None if factors[0] is None else torch.stack(factors).mean(0)
        for part, linear in zip(parts, linears, strict=True):
            if factor is not None:
                linear.input_quantizer._pre_quant_scale.copy_(factor)
                linear.weight.data.copy_(smoothed(weights[f"{part}.weight"], factor))
                blocks = linear.weight.reshape(linear.weight.shape[0], -1, 128).abs().amax(-1).float()
                linear.weight_quantizer[0]._amax.copy_(blocks.reshape(linear.weight_quantizer[0]._amax.shape))
                linear.weight_quantizer[1]._amax.copy_(linear.weight.abs().max())
        for each in (lambda m: m.input_quantizer, _last_weight_quantizer):
            found = [each(linear)._amax for linear in linears if hasattr(each(linear), "_amax")]
            if found and found[0].numel() == 1:
                largest = torch.stack(found).max()
                for amax in found:
                    amax.copy_(largest)


def _last_weight_quantizer(linear: Any) -> Any:
    quantizer = linear.weight_quantizer
    return quantizer[-1] if hasattr(quantizer, "__getitem__") else quantizer


def found_by_calibration(model: Any, shape: Shape) -> dict[str, Any]:
    """Megatron's linear -> input amax and factor; attention -> amax of keys and values."""
    found: dict[str, Any] = {}
    for name, parts in groups(shape).items():
        quantizer = model.get_submodule(parts[0]).input_quantizer
        amax, factor = getattr(quantizer, "_amax", None), getattr(quantizer, "_pre_quant_scale", None)
        found[name] = {
            "input": None if amax is None else float(amax),
            "factor": None if factor is None else factor.view(torch.int16).tolist(),
        }
    for layer in range(shape.num_layers):
        attention = model.get_submodule(f"model.layers.{layer}.self_attn")
        bmm = [getattr(attention, f"{part}_bmm_quantizer", None) for part in "kv"]
        if all(hasattr(each, "_amax") for each in bmm):
            found[f"{layer}.kv"] = [float(each._amax) for each in bmm]
    return found


def fingerprints(path: Path) -> dict[str, dict[str, object]]:
    with safe_open(path, "pt") as file:
        return {
            name: {
                "dtype": file.get_slice(name).get_dtype(),
                "shape": file.get_slice(name).get_shape(),
                "sha256": hashlib.sha256(
                    file.get_tensor(name).contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
                ).hexdigest(),
            }
            for name in file.keys()  # noqa: SIM118
        }


def record(name: str, folder: Path) -> None:
    shape, config, kv_cache = RUNS[name]
    result: dict[str, Any] = {"config": config, "layouts": {}}
    with tempfile.TemporaryDirectory() as work, torch.inference_mode():
        for tp in (1, 2):
            out = Path(work) / f"tp{tp}"
            model = calibrated(shape, config, kv_cache)
            result["calibration"] = found_by_calibration(model, shape)
            export_tensorrt_llm_checkpoint(
                model, "llama", torch.bfloat16, export_dir=str(out), inference_tensor_parallel=tp
            )
            table = json.loads((out / "config.json").read_text())["quantization"]
            ranks = [fingerprints(out / f"rank{rank}.safetensors") for rank in range(tp)]
            result["layouts"][f"tp{tp}"] = {"quantization": table, "ranks": ranks}
        out = Path(work) / "hf"
        export_hf_checkpoint(calibrated(shape, config, kv_cache), export_dir=str(out))
        config_json = json.loads((out / "config.json").read_text())
        result["huggingface"] = {
            "tensors": fingerprints(out / "model.safetensors"),
            "quantization_config": config_json["quantization_config"],
            "hf_quant_config": json.loads((out / "hf_quant_config.json").read_text()),
        }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    for each in sys.argv[2:] or RUNS:
        record(each, Path(sys.argv[1]))
        print("recorded", each, flush=True)
