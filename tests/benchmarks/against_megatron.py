"""Time an export against Megatron-Core's own exporter and against torch's checkpoint load and save, in one run.

    python tests/benchmarks/against_megatron.py [--cache DIR] [--runs 3] [--tp 2] [--model 2gb|8gb]

All start from the same real Megatron checkpoint of 2 or 8 GB, read into the page cache before each run, from which
the memory of the run before may have pushed it, and end with the files on disk (fsync), interleaved:

  export    `dist-export export`: rank files and config.json
  megatron  `dist_checkpointing.load_plain_tensors` of the whole model, Megatron-Core's single-device TensorRT-LLM
            weight converter with stacked layers (its fastest documented setting),
            safetensors `save_file` of every rank. What of tensorrt_llm the converter imports is two helpers of one line
            each, which stand in here. It writes no config.json.
  dcp       `torch.distributed.checkpoint` load of every tensor into memory and save of them again

"net" takes off what starting the interpreter and importing costs, measured by each program itself.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from shared_runs import START, command_line, make_checkpoint, timed

MEGATRON = """
import logging, os, resource, sys, time, types, warnings
warnings.simplefilter("ignore"); logging.disable(logging.WARNING)
begun = time.monotonic()
import torch, torch.distributed as dist
from safetensors.torch import save_file
helpers = types.ModuleType("tensorrt_llm._utils")
helpers.pad_vocab_size = lambda size, tp: -(-size // tp) * tp
helpers.str_dtype_to_torch = lambda name: getattr(torch, name)
sys.modules["tensorrt_llm"], sys.modules["tensorrt_llm._utils"] = types.ModuleType("tensorrt_llm"), helpers
from megatron.core import dist_checkpointing
from megatron.core.export.data_type import DataType
from megatron.core.export.export_config import ExportConfig
from megatron.core.export.trtllm.model_to_trllm_mapping.default_conversion_dict import DEFAULT_CONVERSION_DICT
from megatron.core.export.trtllm.trtllm_weights_converter import single_device_trtllm_model_weights_converter as single
from megatron.core.transformer.transformer_config import TransformerConfig
single.tqdm = lambda items, desc: items
started = time.monotonic()
source, target, tp = sys.argv[1], sys.argv[2], int(sys.argv[3])
os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
dist.init_process_group("gloo", init_method=f"file://{target}.rendezvous", rank=0, world_size=1)
weights = {k: v for k, v in dist_checkpointing.load_plain_tensors(source).items() if isinstance(v, torch.Tensor)}
layers, hidden, ffn = map(int, sys.argv[4:])
config = TransformerConfig(num_layers=layers, hidden_size=hidden, num_attention_heads=32, num_query_groups=8,
                           kv_channels=hidden // 32, ffn_hidden_size=ffn, normalization="RMSNorm",
                           gated_linear_unit=True, activation_func=torch.nn.functional.silu)
converter = single.SingleDeviceTRTLLMModelWeightsConverter(
    ExportConfig(inference_tp_size=tp), config, DataType.bfloat16, activation="swiglu")
converter.convert(weights, DEFAULT_CONVERSION_DICT, state_dict_split_by_layer_numbers=False)
os.makedirs(target)
for rank in range(tp):
    mine = {}
    for name, value in converter.trtllm_model_weights.items():
        if name.endswith(".bin"):
            head, number, _ = name.rsplit(".", 2)
            if int(number) != rank:
                continue
            name = head
        elif "vocab_embedding" in name or "lm_head" in name:
            value = value.chunk(tp)[rank].contiguous()
        mine[name] = value
    path = f"{target}/rank{rank}.safetensors"
    save_file(mine, path)
    descriptor = os.open(path, os.O_RDONLY); os.fsync(descriptor); os.close(descriptor)
print(time.monotonic() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
os._exit(0)
"""

DCP = """
import logging, os, resource, sys, time, warnings
warnings.simplefilter("ignore"); logging.disable(logging.WARNING)
import torch, torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
started = time.monotonic()
reader = dcp.FileSystemReader(sys.argv[1])
entries = reader.read_metadata().state_dict_metadata.items()
state = {name: torch.empty(entry.size, dtype=entry.properties.dtype)
         for name, entry in entries if isinstance(entry, TensorStorageMetadata)}
dcp.load(state, storage_reader=reader, no_dist=True)
dcp.save(state, storage_writer=dcp.FileSystemWriter(sys.argv[2]), no_dist=True)
print(time.monotonic() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
os._exit(0)
"""

SIZES = {"2gb": (16, 2048, 7168), "8gb": (20, 4096, 11008)}
"""Layers, hidden size and ffn size of the models of shared_runs.py."""


def warm(source: Path) -> None:
    """Have a checkpoint's files in the page cache."""
    for path in source.glob("*.distcp"):
        with path.open("rb", buffering=0) as file:
            while file.read(8 << 20):
                pass


def run_program(program: str, *arguments: object) -> tuple[float, float, int]:
    """(whole seconds, net seconds, peak bytes) of a program in an interpreter of its own."""
    begun = time.monotonic()
    command = [sys.executable, "-c", program, *map(str, arguments)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    whole = time.monotonic() - begun
    net, peak = done.stdout.split()[-2:]
    return whole, float(net), int(peak)


def run_export(checkpoint: Path, target: Path, tp: int) -> tuple[float, float, int]:
    """The same of an export; its start is that of an interpreter which imports the exporter and does nothing."""
    command = [sys.executable, "-m", "dist_export", "export", str(checkpoint), str(target), "--tp", str(tp)]
    whole = timed(command)
    start = timed([sys.executable, "-c", START])
    processes = json.loads((target / "export_manifest.json").read_text())["run"]["processes"]
    return whole, whole - start, sum(process["peak_memory"] for process in processes)


def main() -> None:
    parser = command_line(__doc__, runs=3)
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--model", choices=SIZES, default="2gb")
    options = parser.parse_args()
    checkpoint = make_checkpoint(options.cache, options.model)
    (source,) = checkpoint.glob("iter_*")
    found: dict[str, list[tuple[float, float, int]]] = {"export": [], "megatron": [], "dcp": []}
    with tempfile.TemporaryDirectory(dir=options.cache) as work:
        for number in range(options.runs):
            for name in found:
                target = Path(work) / f"{name}{number}"
                warm(source)
                if name == "export":
                    found[name].append(run_export(checkpoint, target, options.tp))
                else:
                    program = MEGATRON if name == "megatron" else DCP
                    found[name].append(run_program(program, source, target, options.tp, *SIZES[options.model]))
                shutil.rmtree(target)
                os.sync()
    ours = [statistics.median(values) for values in zip(*found["export"], strict=True)]
    print("| program | whole s | net s | whole / export | net / export | peak memory |\n|---|---|---|---|---|---|")
    for name, runs in found.items():
        whole, net, _ = (statistics.median(values) for values in zip(*runs, strict=True))
        peak = max(each[2] for each in runs)
        print(
            f"| {name} | {whole:.2f} | {net:.2f} | {whole / ours[0]:.1f} | {net / ours[1]:.1f} | {peak / 1e9:.2f} GB |"
        )


if __name__ == "__main__":
    main()
