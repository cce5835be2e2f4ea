"""Small models in the formats of other trainers and of other Megatron releases, written to the source that is named."""

from __future__ import annotations

import argparse
import io
import json
import tarfile
from itertools import product
from pathlib import Path
from typing import Any

import torch
import yaml

from support.exports import config_of, export, raw_bytes
from support.small_models import SmallModel
from support.torch_dist import write_torch_dist

FUNCTIONS = {"silu": "torch.nn.functional.silu", "gelu": "torch._C._nn.gelu"}


def transformer_config(model: SmallModel) -> dict[str, Any]:
    """The fields of Megatron-Core's TransformerConfig as megatron/training/config/yaml_utils.py dumps them."""
    args = model.args
    names = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels")
    names += ("normalization", "layernorm_epsilon", "layernorm_zero_centered_gamma", "add_bias_linear", "add_qkv_bias")
    names += ("tensor_model_parallel_size", "pipeline_model_parallel_size")
    function = "silu" if args["swiglu"] else "gelu"
    if args["squared_relu"]:
        activation: Any = {"_target_": "megatron.core.activations.squared_relu", "_call_": False}
    else:
        activation = {"_target_": FUNCTIONS[function], "_call_": False}
    return {
        **{name: args[name] for name in names},
        "activation_func": activation,
        "gated_linear_unit": args["swiglu"],
        "bias_activation_fusion": True if args["swiglu"] else args["bias_gelu_fusion"],
        "num_moe_experts": None,
        "params_dtype": {"_target_": "torch.bfloat16", "_call_": False},
        "attention_backend": {
            "_target_": "megatron.core.transformer.enums.AttnBackend",
            "_call_": True,
            "_args_": [5],
            "_name_": "auto",
        },
        "window_size": None,
        "init_method": {"_target_": "torch.nn.init.normal_", "_partial_": True, "mean": 0.0, "std": 0.02},
        "softmax_scale": None,
        "heterogeneous_block_specs": False,
    }


def gpt_config(model: SmallModel) -> dict[str, Any]:
    """The fields that NeMo 2 (`GPTConfig`) and Megatron-Bridge (`GPTModelProvider`) add."""
    return {
        "share_embeddings_and_output_weights": not model.args["untie_embeddings_and_output_weights"],
        "position_embedding_type": model.args["position_embedding_type"],
        "rotary_base": model.args["rotary_base"],
        "rotary_percent": model.args["rotary_percent"],
        "seq_len_interpolation_factor": None,
        "seq_length": model.args["max_position_embeddings"],
        "make_vocab_size_divisible_by": 64,
        "vocab_size": model.args["padded_vocab_size"],
    }


def write_bridge(top: Path, model: SmallModel, *, nested: bool = False, iteration: int = 10, **changes: Any) -> Path:
    """A Megatron-Bridge --save folder (training/checkpointing.py, `save_checkpoint`): trackers at its top, no args.

    `nested`: the newer ``model`` with the TransformerConfig inside (models/gpt/gpt_builder.py, `GPTModelConfig`).
    """
    folder = write_torch_dist(top / f"iter_{iteration:07d}", model.tensors, args=None)
    more = {**gpt_config(model), "rope_scaling": False, "rope_scaling_factor": 1.0, "should_pad_vocab": False}
    more |= changes
    if nested:
        target = "megatron.bridge.models.gpt.gpt_builder.GPTModelConfig"
        inner = {"_target_": "megatron.bridge.models.transformer_config.TransformerConfig", **transformer_config(model)}
        inner["activation_func"] = "silu"  # models/gpt/model_config.py, `BridgeGPTModelConfig.as_dict`
        config = {"_target_": target, "_builder_": "megatron.bridge.models.gpt.gpt_builder.GPTModelBuilder"}
        config |= {"transformer": inner, **more}
    else:
        target = "megatron.bridge.models.llama.llama_provider.LlamaModelProvider"
        config = {"_target_": target, **transformer_config(model), **more}
    document = {"_target_": "megatron.bridge.training.config.ConfigContainer", "model": config, "train": {"seed": 1}}
    (folder / "run_config.yaml").write_text(yaml.safe_dump(document))
    torch.save({"step": torch.tensor(iteration)}, folder / "train_state.pt")
    torch.save({"step": torch.tensor(iteration)}, top / "latest_train_state.pt")
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")
    (top / "latest_checkpointed_iteration.txt").write_text(str(iteration))
    return top


def write_nemo2(top: Path, model: SmallModel, **changes: Any) -> Path:
    """A NeMo 2 folder: weights with ``module.`` in front of names, context/model.yaml with every default
    (nemo/lightning/io/mixin.py, `_io_dump_yaml`)."""
    write_torch_dist(top / "weights", model.tensors, args=None, prefix="module.")
    common = torch.load(top / "weights" / "common.pt", weights_only=False)
    common |= {"global_step": 10, "pytorch-lightning_version": "2.4.0", "loops": {}}
    torch.save(common, top / "weights" / "common.pt")
    config = {"_target_": "nemo.collections.llm.gpt.model.llama.Llama3Config8B", **transformer_config(model)}
    config |= {**gpt_config(model), **changes}
    context = top / "context"
    (context / "nemo_tokenizer").mkdir(parents=True)
    document = {"_target_": "nemo.collections.llm.gpt.model.llama.LlamaModel", "config": config, "tokenizer": None}
    (context / "model.yaml").write_text(yaml.safe_dump(document))
    (context / "io.json").write_text(json.dumps({"objects": {}, "root": {"type": "ref"}}))
    return top


def nemo_config(model: SmallModel, **changes: Any) -> dict[str, Any]:
    """model_config.yaml of NeMo 1 (nemo/collections/nlp/models/language_modeling/megatron_gpt_model.py)."""
    args = model.args
    norms = {"RMSNorm": "rmsnorm", "LayerNorm": "layernorm1p" if args["layernorm_zero_centered_gamma"] else "layernorm"}
    names = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels")
    names += ("layernorm_epsilon", "max_position_embeddings", "position_embedding_type", "rotary_base")
    names += ("tensor_model_parallel_size", "pipeline_model_parallel_size")
    return {
        "mcore_gpt": True,
        **{name: args[name] for name in names},
        "encoder_seq_length": args["max_position_embeddings"],
        "activation": "fast-swiglu" if args["swiglu"] else "squared-relu" if args["squared_relu"] else "gelu",
        "normalization": norms[args["normalization"]],
        "bias": args["add_bias_linear"],
        "bias_activation_fusion": False,
        "rotary_percentage": args["rotary_percent"],
        "share_embeddings_and_output_weights": not args["untie_embeddings_and_output_weights"],
        "transformer_block_type": "pre_ln",
        "tokenizer": {"library": "sentencepiece", "model": "nemo:0123_tokenizer.model"},
        "precision": "bf16",
        "nemo_version": "1.23.0",
        "target": "nemo.collections.nlp.models.language_modeling.megatron_gpt_model.MegatronGPTModel",
        **changes,
    }


def write_nemo_folder(folder: Path, model: SmallModel, **changes: Any) -> Path:
    """An extracted .nemo without its weights."""
    folder.mkdir(parents=True)
    (folder / "model_config.yaml").write_text(yaml.safe_dump(nemo_config(model, **changes)))
    (folder / "0123456789abcdef0123456789abcdef_tokenizer.model").write_bytes(b"tokenizer")
    return folder


def pack(folder: Path, archive: Path, *, mode: str = "w:") -> Path:
    """A tar as NeMo makes it: members begin with ``./`` (nemo/core/connectors/save_restore_connector.py)."""
    with tarfile.open(archive, mode) as tar:
        tar.add(folder, arcname=".")
    return archive


def write_zarr(
    folder: Path, tensors: dict[str, torch.Tensor], *, args: dict[str, Any] | None, parts: int = 2, prefix: str = ""
) -> Path:
    """A zarr checkpoint: every layer apart, the next dim in `parts` (megatron/core/dist_checkpointing/strategies/
    zarr.py, `_create_zarr_array`). Cells on the edge are filled up where the grid does not divide the shape."""
    folder.mkdir(parents=True)
    for name, tensor in tensors.items():
        write_zarr_array(folder / (prefix + name), tensor, _cell(name, tensor, parts))
    (folder / "decoder.layers.mlp.linear_fc1._extra_state").mkdir()
    torch.save(None, folder / "decoder.layers.mlp.linear_fc1._extra_state" / "shard_0_2.pt")
    state = {"checkpoint_version": 3.0, "iteration": 10}
    torch.save(state if args is None else {**state, "args": argparse.Namespace(**args)}, folder / "common.pt")
    about = {"sharded_backend": "zarr", "sharded_backend_version": 1, "common_backend": "torch"}
    (folder / "metadata.json").write_text(json.dumps(about))
    return folder


def write_zarr_array(folder: Path, tensor: torch.Tensor, cell: tuple[int, ...]) -> None:
    """One key: ``.zarray`` and raw cells of equal size."""
    folder.mkdir(parents=True)
    codes = {torch.bfloat16: "bfloat16", torch.float32: "<f4", torch.float16: "<f2"}
    header = {"zarr_format": 2, "order": "C", "compressor": None, "filters": None, "fill_value": None}
    header |= {"shape": list(tensor.shape), "chunks": list(cell), "dtype": codes[tensor.dtype]}
    (folder / ".zarray").write_text(json.dumps(header))
    for position in product(*(range(-(-size // step)) for size, step in zip(tensor.shape, cell, strict=True))):
        box = tuple(slice(p * step, (p + 1) * step) for p, step in zip(position, cell, strict=True))
        whole = torch.full(cell, 7, dtype=tensor.dtype)
        part = tensor[box]
        whole[tuple(slice(0, size) for size in part.shape)] = part
        (folder / (".".join(map(str, position)) or "0")).write_bytes(raw_bytes(whole))


def _cell(name: str, tensor: torch.Tensor, parts: int) -> tuple[int, ...]:
    cell = list(tensor.shape)
    stacked = name.startswith("decoder.layers.")
    if stacked:
        cell[0] = 1
    if len(cell) > int(stacked):
        cell[int(stacked)] = -(-cell[int(stacked)] // parts)
    return tuple(cell)


def add_member(archive: Path, name: str, data: bytes = b"x", **fields: Any) -> Path:
    """Append a member; `fields` are those of tarfile.TarInfo (``type``, ``linkname``)."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    for field, value in fields.items():
        setattr(member, field, value)
    with tarfile.open(archive, "a:" if archive.exists() else "w:") as tar:
        tar.addfile(member, io.BytesIO(data))
    return archive


def exported(checkpoint: Path, output: Path, *arguments: object) -> dict[str, Any]:
    """An export as {file name: bytes} of its weights, with config.json."""
    export(checkpoint, output, *arguments)
    return {**{p.name: p.read_bytes() for p in output.glob("*.safetensors")}, "config.json": config_of(output)}
