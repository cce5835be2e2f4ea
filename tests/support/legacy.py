"""Legacy checkpoints for tests: real ones, ways to save them again as other releases did, and a reader of tables."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from dist_export.checkpoint.index import CheckpointIndex
from support.megatron_checkpoints import per_layer_weights

SCRIPT = Path(__file__).parent / "save_legacy.py"
ITERATION = "iter_0000010"
_NORMS = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}
_EXPERTS = re.compile(r"(.*\.experts\.experts\.)(linear_fc[12]\..*)")


def save_models(out: Path, models: dict[str, dict[str, Any]]) -> None:
    """Run save_legacy.py; RuntimeError with what it printed when it fails."""
    command = [sys.executable, str(SCRIPT), str(out), json.dumps(models)]
    process = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if process.returncode:
        raise RuntimeError(process.stdout + process.stderr)


def expected_tensors(model: Path) -> dict[str, torch.Tensor]:
    """The weights of ``model/torch_dist`` under the names that its legacy twin has: a key per layer and expert."""
    expected: dict[str, torch.Tensor] = {}
    for name, tensor in per_layer_weights(model / "torch_dist" / ITERATION).items():
        for fused, own in _NORMS.items():
            name = name.replace(fused, own)
        match = _EXPERTS.fullmatch(name)
        parts = [(name, tensor)]
        if match:
            parts = [(f"{match[1]}{expert}.{match[2]}", part) for expert, part in enumerate(tensor)]
        expected.update(parts)
    return expected


def tensors_of(index: CheckpointIndex) -> dict[str, torch.Tensor]:
    """Every tensor of a table, put together from its chunks element by element."""
    files = [bytearray(index.path(number).read_bytes()) for number in range(len(index.files))]
    found = {}
    for name, info in index.tensors.items():
        dtype = getattr(torch, info.dtype)
        whole = torch.empty(info.shape, dtype=dtype)
        for chunk in index.chunks(name):
            box = tuple(slice(a, a + n) for a, n in zip(chunk.box.start, chunk.box.size, strict=True))
            if chunk.strides is None:
                raw = files[chunk.file][chunk.offset : chunk.offset + chunk.length]
                whole[box] = torch.frombuffer(raw, dtype=dtype).reshape(chunk.box.size)
            else:
                steps = [step // dtype.itemsize for step in chunk.strides]
                reach = 1 + sum((n - 1) * step for n, step in zip(chunk.box.size, steps, strict=True))
                raw = files[chunk.file][chunk.offset : chunk.offset + reach * dtype.itemsize]
                whole[box] = torch.frombuffer(raw, dtype=dtype).as_strided(chunk.box.size, steps)
        found[name] = whole
    return found


def assert_same(index: CheckpointIndex, expected: dict[str, torch.Tensor]) -> None:
    """Names, shapes, dtypes and every bit."""
    found = tensors_of(index)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def rank_files(folder: Path) -> Iterator[Path]:
    """The files of all ranks below a folder."""
    return iter(sorted(folder.rglob("model_optim_rng.pt")))


def save_again(source: Path, folder: Path, change: Callable[[dict[str, Any]], Any], **how: Any) -> Path:
    """A copy of a checkpoint in which every rank's state went through `change` (which returns it, or None for in
    place); `how` goes to torch.save. Only for checkpoints of these tests: it unpickles without care."""
    shutil.copytree(source, folder)
    for path in rank_files(folder):
        state = torch.load(path, weights_only=False)
        result = change(state)
        torch.save(state if result is None else result, path, **how)
    return folder


def unchanged(state: dict[str, Any]) -> None:
    """Saves as it is."""


def into_one_buffer(state: dict[str, Any]) -> None:
    """As the distributed optimizer keeps weights: views into one padded buffer per dtype, from its end backwards."""
    for key in [key for key in state if re.fullmatch(r"model\d*", key)]:
        tensors = {name: value for name, value in state[key].items() if isinstance(value, torch.Tensor)}
        for dtype in {tensor.dtype for tensor in tensors.values()}:
            alike = {name: tensor for name, tensor in tensors.items() if tensor.dtype == dtype}
            padded = [-(-tensor.numel() // 64) * 64 for tensor in alike.values()]
            buffer, end = torch.zeros(sum(padded), dtype=dtype), sum(padded)
            for (name, tensor), size in zip(alike.items(), padded, strict=True):
                end -= size
                view = buffer[end : end + tensor.numel()].view(tensor.shape)
                view.copy_(tensor)
                state[key][name] = view
    state["optimizer"] = {"fp32_from_fp16_params": [[torch.zeros(256, 256)]]}


def as_grouped_by_te(state: dict[str, Any]) -> None:
    """Names of TEGroupedMLP: a weight per expert of one module (transformer/moe/experts.py)."""
    renamed = {}
    for name, value in state["model"].items():
        match = re.fullmatch(r"(.*\.experts)\.local_experts\.(\d+)\.(linear_fc[12])\.(weight|_extra_state)", name)
        if match is None:
            renamed[name] = value
        elif match[4] == "weight":
            renamed[f"{match[1]}.{match[3]}.weight{match[2]}"] = value
    state["model"] = renamed


def stacked_by_te(state: dict[str, Any]) -> None:
    """Names with ``moe_single_grouped_weight``: one weight stacked over the rank's experts."""
    as_grouped_by_te(state)
    stacked: dict[str, list[torch.Tensor]] = {}
    for name in [name for name in state["model"] if re.search(r"\.linear_fc[12]\.weight\d+$", name)]:
        stacked.setdefault(name.rstrip("0123456789"), []).append(state["model"].pop(name))
    state["model"] |= {name: torch.stack(parts) for name, parts in stacked.items()}


_CLASSIC = (
    (r"embedding\.", "embedding."),
    (r"decoder\.layers\.(\d+)\.self_attention\.linear_qkv\.", r"{stack}.layers.\1.{attention}.query_key_value."),
    (r"decoder\.layers\.(\d+)\.self_attention\.linear_proj\.", r"{stack}.layers.\1.{attention}.dense."),
    (r"decoder\.layers\.(\d+)\.input_layernorm\.", r"{stack}.layers.\1.input_{norm}."),
    (r"decoder\.layers\.(\d+)\.pre_mlp_layernorm\.", r"{stack}.layers.\1.post_attention_{norm}."),
    (r"decoder\.layers\.(\d+)\.mlp\.linear_fc1\.", r"{stack}.layers.\1.mlp.dense_h_to_4h."),
    (r"decoder\.layers\.(\d+)\.mlp\.linear_fc2\.", r"{stack}.layers.\1.mlp.dense_4h_to_h."),
    (r"decoder\.final_layernorm\.", "{stack}.final_{norm}."),
)


def as_classic(*, version: float, stack: str, attention: str, norm: str) -> Callable[[dict[str, Any]], None]:
    """The state of a classic model: its names in nested dictionaries, its q, k, v rows in the order of `version`.

    Only for models without grouped queries. Names and order from megatron/model/{language_model,transformer}.py and
    checkpointing.py of the releases.
    """
    words = {"stack": stack, "attention": attention, "norm": norm}

    def change(state: dict[str, Any]) -> None:
        args = state["args"]
        heads = args.num_attention_heads // args.tensor_model_parallel_size
        for key in [key for key in state if re.fullmatch(r"model\d*", key)]:
            state[key] = _nested(state[key], words, stack, version, heads)
        if version:
            state["checkpoint_version"] = version
        else:
            del state["checkpoint_version"]
        if version < 3:
            args.model_parallel_size = args.tensor_model_parallel_size
            del args.tensor_model_parallel_size

    return change


def _nested(model: dict[str, Any], words: dict[str, str], stack: str, version: float, heads: int) -> dict[str, Any]:
    language: dict[str, Any] = {"embedding": {}, stack: {}}
    result: dict[str, Any] = {"language_model": language}
    for name, value in model.items():
        if not isinstance(value, torch.Tensor):
            continue
        if name == "output_layer.weight":
            result["word_embeddings_for_head"] = {"weight": value}
            continue
        for core, classic in _CLASSIC:
            name = re.sub(f"^{core}", classic, name).format(**words)
        if "query_key_value" in name:
            value = _older_rows(value, version, heads)
        top, _, rest = name.partition(".")
        if top == "embedding":
            module, kind = rest.split(".")
            language["embedding"][module] = {kind: value}
        else:
            language[top][rest] = value
    return result


def _older_rows(tensor: torch.Tensor, version: float, heads: int) -> torch.Tensor:
    """Rows ``[heads, 3, d]`` as `version` ordered them."""
    split = tensor.reshape(heads, 3, -1, *tensor.shape[1:])
    if version == 0:
        split = split.transpose(0, 1)  # [3, heads, d]
    elif version == 1:
        split = split.transpose(1, 2)  # [heads, d, 3]
    return split.reshape(tensor.shape).contiguous()
