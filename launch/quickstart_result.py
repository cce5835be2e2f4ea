"""Show and check what launch/quickstart.sh exported, with libraries that share nothing with dist_export."""

from __future__ import annotations

import json
import sys
import warnings
import zlib
from pathlib import Path

import torch
from safetensors import safe_open
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load

SHOWN = (
    "transformer.vocab_embedding.weight",
    "transformer.layers.0.attention.qkv.weight",
    "transformer.layers.0.attention.dense.weight",
    "transformer.layers.0.mlp.gate.weight",
    "lm_head.weight",
)


def raw_bytes(tensor: torch.Tensor) -> bytes:
    """The bytes of a tensor, row-major."""
    return bytes(tensor.contiguous().view(-1).view(torch.uint8).numpy())


def show_tensors(file_name: Path) -> None:
    """A few tensors of one rank file."""
    print(f"\nsome tensors of {file_name.name}")
    with safe_open(file_name, "pt") as file:
        for name in SHOWN:
            tensor = file.get_tensor(name)
            first = ", ".join(f"{value:.4f}" for value in tensor.flatten()[:3].tolist())
            print(f"  {name:44} {'x'.join(map(str, tensor.shape)):10} {tensor.dtype}  {first}, ...")


def check_checksums(export: Path) -> None:
    """Every tensor in the files against its checksum in export_manifest.json."""
    files = json.loads((export / "export_manifest.json").read_text())["files"]
    for file_name, entry in files.items():
        with safe_open(export / file_name, "pt") as file:
            for name, expected in entry["tensors"].items():
                actual = f"{zlib.crc32(raw_bytes(file.get_tensor(name))):08x}"
                if actual != expected["crc32"]:
                    sys.exit(f"{file_name}: {name}: CRC-32 {actual}, the manifest says {expected['crc32']}")
    num_tensors = sum(len(entry["tensors"]) for entry in files.values())
    print(f"\nchecksums: all {num_tensors} tensors of {len(files)} files agree with export_manifest.json")


def check_values(checkpoint: Path, export: Path) -> None:
    """One weight, joined from all ranks, against the checkpoint as torch.distributed.checkpoint reads it."""
    config = json.loads((export / "config.json").read_text())
    source, target = "decoder.layers.self_attention.linear_proj.weight", "transformer.layers.0.attention.dense.weight"
    iteration = int((checkpoint / "latest_checkpointed_iteration.txt").read_text())
    shape = (config["num_hidden_layers"], config["hidden_size"], config["hidden_size"])
    stored = {source: torch.empty(shape, dtype=torch.bfloat16)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        load(stored, storage_reader=FileSystemReader(checkpoint / f"iter_{iteration:07d}"), no_dist=True)
    parts = []
    for rank in range(config["mapping"]["tp_size"]):
        with safe_open(export / f"rank{rank}.safetensors", "pt") as file:
            parts.append(file.get_tensor(target))
    if not torch.equal(torch.cat(parts, dim=1), stored[source][0]):
        sys.exit(f"{target}, joined from {len(parts)} ranks, differs from {source}, layer 0, in the checkpoint")
    print(f"values: {target}, joined from {len(parts)} ranks, equals {source}[0] of the checkpoint")


def main(checkpoint: Path, export: Path) -> None:
    """Raises SystemExit with a message when the export is not what it should be."""
    show_tensors(export / "rank0.safetensors")
    check_checksums(export)
    check_values(checkpoint, export)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
