"""Export a checkpoint whose largest tensor has 4 GiB within a small memory budget.

    python tests/benchmarks/large_tensor.py FOLDER [--host-memory 512m]

Writes a one-layer Llama-style checkpoint in torch_dist format into FOLDER: its tied embedding has 524288 x 4096
bfloat16 elements in one record, more than a zip can say without 64-bit sizes. Exports it to tp 2 with the budget
given, and prints what each process used.
Needs about 13 GB of disk, and 5 GB of memory to make the checkpoint.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY / "tests"))

from support.small_models import LLAMA, small_model  # noqa: E402
from support.torch_dist import write_torch_dist  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--host-memory", default="512m")
    options = parser.parse_args()
    checkpoint, output = options.folder / "iter_0000010", options.folder / "export"
    if not checkpoint.exists():
        model = small_model(
            LLAMA, num_layers=1, hidden_size=4096, ffn_hidden_size=512, num_attention_heads=32, kv_channels=128,
            num_query_groups=8, vocab_size=524287, padded_vocab_size=524288,
            untie_embeddings_and_output_weights=False,
        )  # fmt: skip
        write_torch_dist(checkpoint, model.tensors, args=model.args)
    command = ["export", checkpoint, output, "--tp", 2, "--overwrite", "--host-memory", options.host_memory]
    subprocess.run([sys.executable, "-m", "dist_export", *map(str, command)], check=True, cwd=REPOSITORY)
    processes = json.loads((output / "export_manifest.json").read_text())["run"]["processes"]
    growth = max(p["peak_memory"] - p["memory_at_start"] for p in processes)
    print(f"largest tensor 4 GiB, budget {options.host_memory}: memory grew by {growth / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
