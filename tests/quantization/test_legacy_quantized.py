"""Quantised models in legacy files: the exports are those of the same model in torch_dist, byte for byte."""

from __future__ import annotations

import argparse
import hashlib
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support.exports import fingerprints
from support.legacy import tensors_of
from support.legacy_quantized import layer_states, rank_tensors, save_as_legacy
from support.other_formats import write_zarr_array
from support.quantized import SCHEMES, export_here, read

from dist_export.checkpoint.open import open_checkpoint
from dist_export.errors import ExportError
from dist_export.targets.trtllm.target import TrtllmOptions

PROJ = "decoder.layers.0.self_attention.linear_proj"
FC1 = "decoder.layers.1.mlp.linear_fc1"


def exported(checkpoint: Path, output: Path) -> dict[str, str]:
    """File -> SHA-256 of an export."""
    folder = export_here(checkpoint, output, TrtllmOptions())
    files = [*folder.glob("rank*.safetensors"), folder / "config.json"]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_same_export_as_torch_dist(scheme: str, quantized_checkpoints: dict[str, Path], tmp_path: Path) -> None:
    checkpoint = quantized_checkpoints[scheme]
    legacy = save_as_legacy(checkpoint, tmp_path / "legacy", tp=2)
    assert exported(legacy, tmp_path / "a") == exported(checkpoint, tmp_path / "b")


@pytest.mark.parametrize(
    ("scheme", "name", "value"),
    [
        ("fp8", f"{PROJ}.weight_quantizer._amax", torch.tensor(3.0, dtype=torch.bfloat16)),
        ("fp8", f"{PROJ}.input_quantizer._amax", torch.tensor(3.0, dtype=torch.bfloat16)),
        ("int4_awq", f"{FC1}.input_quantizer._pre_quant_scale", torch.ones(256, dtype=torch.bfloat16)),
    ],
)
def test_ranks_that_differ_are_both_named(
    scheme: str, name: str, value: torch.Tensor, quantized_checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    legacy = save_as_legacy(quantized_checkpoints[scheme], tmp_path / "c", tp=2, changes={1: {name: value}})
    message = rf"mp_rank_00.*{name}: tp rank 0 and tp rank 1 have different values of what ModelOpt keeps equal"
    with pytest.raises(ExportError, match=message):
        open_checkpoint(legacy)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (f"{PROJ}.weight_quantizer._amax", torch.ones(257, 1), r"has shape \[257, 1\] beside a weight of 256 rows"),
        (f"{PROJ}.weight_quantizer._amax", torch.ones(257), r"has shape \[257\], expected a single number"),
        (f"{PROJ}.input_quantizer._amax", torch.ones(4, 1), r"has shape \[4, 1\], expected a single number"),
        (f"{PROJ}.weight_quantizer.svdquant_lora_a", torch.ones(4, 4), "how tp ranks share this tensor is not known"),
        ("decoder.x.weight_quantizer._amax", torch.ones(4, 1), "how tp ranks share this tensor is not known"),
    ],
)
def test_what_no_quantiser_has(
    name: str, value: torch.Tensor, message: str, quantized_checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    changes = {rank: {name: value} for rank in range(2)}
    legacy = save_as_legacy(quantized_checkpoints["int4_awq"], tmp_path / "c", tp=2, changes=changes)
    with pytest.raises(ExportError, match=message):
        open_checkpoint(legacy)


def test_row_amax_that_differs_between_column_parts(tmp_path: Path) -> None:
    """One per row and rank: of blocks where the rank's columns may be one, else a fault."""
    for columns, shape in ((128, (8, 2)), (256, None)):
        folder = tmp_path / str(columns)
        for rank in range(2):
            model = {f"{PROJ}.weight": torch.ones(8, columns)}
            model[f"{PROJ}.weight_quantizer._amax"] = torch.full((8, 1), 1.0 + rank)
            _save(folder, rank, model)
        if shape is None:
            with pytest.raises(ExportError, match="tp rank 0 and tp rank 1 have different values"):
                open_checkpoint(folder)
        else:
            assert open_checkpoint(folder).index.shapes()[f"{PROJ}.weight_quantizer._amax"][0] == shape


def _save(folder: Path, rank: int, model: dict[str, Any], **more: Any) -> None:
    args = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 1, "num_layers": 1, **more}
    path = folder / f"mp_rank_{rank:02d}" / "model_optim_rng.pt"
    path.parent.mkdir(parents=True)
    state = {"model": model, "args": argparse.Namespace(**args), "iteration": 1, "checkpoint_version": 3.0}
    torch.save(state, path)


@pytest.mark.parametrize("grouped", [False, True])
def test_experts(tmp_path: Path, grouped: bool) -> None:
    """A module per expert, or TransformerEngine's grouped linear: its input quantiser is of all experts."""
    expected: dict[str, torch.Tensor] = {}
    moe = "decoder.layers.0.mlp."
    for rank in range(2):
        model: dict[str, torch.Tensor] = {f"{moe}router.weight": torch.ones(2, 4)}
        for expert in range(2):
            whole = f"{moe}experts.experts.{expert}."
            values = torch.arange(8.0).view(4, 2, 1)[:, rank] + 10 * expert  # two blocks of rows, one per rank
            module = "experts." if grouped else f"experts.local_experts.{expert}."
            place = f"weight_quantizer.{expert}." if grouped else "weight_quantizer."
            fc1, fc2 = f"{moe}{module}linear_fc1.", f"{moe}{module}linear_fc2."
            number = str(expert) if grouped else ""
            model |= {f"{fc1}weight{number}": torch.ones(4, 4), f"{fc2}weight{number}": torch.ones(4, 2)}
            model |= {f"{fc1}{place}_amax": values, f"{fc2}{place}_amax": torch.tensor(5.0 + expert)}
            model |= {f"{fc1}input_quantizer._amax": torch.tensor(7.0)}
            parts = [expected[f"{whole}linear_fc1.weight_quantizer._amax"]] if rank else []
            expected[f"{whole}linear_fc1.weight_quantizer._amax"] = torch.cat([*parts, values])
            expected[f"{whole}linear_fc2.weight_quantizer._amax"] = torch.tensor(5.0 + expert)
            expected[f"{whole}linear_fc1.input_quantizer._amax"] = torch.tensor(7.0)
        _save(tmp_path / "c", rank, model, num_experts=2)
    found = tensors_of(open_checkpoint(tmp_path / "c").index)
    assert {name for name in found if "quantizer" in name} == expected.keys()
    for name, values in expected.items():
        assert torch.equal(found[name], values), name


def test_zarr(quantized_checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """An array per key in the cells of the ranks, the layers' states and ModelOpt's folder beside them."""
    checkpoint = quantized_checkpoints["int4_awq"]
    source, folder = checkpoint / "iter_0000010", tmp_path / "zarr" / "iter_0000010"
    tensors, objects, num_chunks = read(source)
    for name, tensor in tensors.items():
        cell = list(tensor.shape)
        cell[1 if ".linear_proj.w" in name or ".linear_fc2.w" in name else 0] //= num_chunks[name]
        write_zarr_array(folder / name, tensor, tuple(cell))
    for name, value in objects.items():
        (folder / name).parent.mkdir(exist_ok=True)
        torch.save(value, folder / f"{name}.pt")
    shutil.copy(source / "common.pt", folder)
    (folder / "metadata.json").write_text('{"sharded_backend": "zarr", "sharded_backend_version": 1}')
    shutil.copytree(source / "modelopt_state", folder / "modelopt_state")
    (folder.parent / "latest_checkpointed_iteration.txt").write_text("10")
    assert exported(folder.parent, tmp_path / "a") == exported(checkpoint, tmp_path / "b")


def test_nemo_rank_files(quantized_checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """State dicts of NeMo 1 keep the layers' states beside the tensors."""
    checkpoint = quantized_checkpoints["int4_awq"]
    folder = tmp_path / "nemo"
    folder.mkdir()
    (folder / "model_config.yaml").write_text(NEMO_CONFIG)
    states = layer_states(checkpoint / "iter_0000010")
    for rank in range(2):
        state = rank_tensors(checkpoint, rank, 2) | states
        file = folder / f"mp_rank_{rank:02d}" / "model_weights.ckpt"
        file.parent.mkdir()
        torch.save({f"model.{name}": tensor for name, tensor in state.items()}, file)
    found, expected = (
        fingerprints(export_here(each, tmp_path / name, TrtllmOptions()) / "rank0.safetensors")
        for each, name in ((folder, "a"), (checkpoint, "b"))
    )
    vocabulary = {"lm_head.weight", "transformer.vocab_embedding.weight"}  # its true size is in no NeMo 1 file
    assert len(found) == len(expected) > 30
    assert {name for name in found if found[name] != expected[name]} == vocabulary


NEMO_CONFIG = """\
mcore_gpt: true
num_layers: 2
hidden_size: 256
ffn_hidden_size: 256
num_attention_heads: 8
num_query_groups: 2
kv_channels: 32
layernorm_epsilon: 1.0e-05
max_position_embeddings: 64
encoder_seq_length: 64
position_embedding_type: rope
rotary_base: 10000
rotary_percentage: 1.0
tensor_model_parallel_size: 2
pipeline_model_parallel_size: 1
activation: fast-swiglu
normalization: rmsnorm
bias: false
share_embeddings_and_output_weights: false
transformer_block_type: pre_ln
precision: bf16
target: nemo.collections.nlp.models.language_modeling.megatron_gpt_model.MegatronGPTModel
"""
