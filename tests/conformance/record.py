"""Record what a right TensorRT-LLM export is, as hashes, from rank files its own converter wrote.

    python tests/conformance/record.py expected/llama.json FOLDER [--options key=value ...]

FOLDER holds one folder per layout (`tp2pp1/` with `config.json` and `rank0.safetensors`, ...; `tp2pp1ep2/` where ranks
hold whole experts). The JSON has

    {"options": {...}, "layouts": {"tp2pp1": {"config": {...}, "ranks": [{NAME: {"dtype", "shape", "sha256"}}]}}}

with the dtype as safetensors spells it, the shape as a list and the SHA-256 of the tensor's raw bytes. `options` are
those of launch/make_checkpoint.py that make the checkpoint of the same weights (at any tp and pp); they are left out
for the checkpoints kept in checkpoints/. Rotary tables are left out: TensorRT-LLM computes them itself.

Layouts with fewer key/value heads than tp ranks (llama, llama_kv2 and mixtral at tp4) have their attention.qkv.weight
from the converter's path for a model in memory (TRTLLM_DISABLE_UNIFIED_CONVERTER=1 and a transformers model given to
`from_hugging_face`), which repeats key/value heads with `dup_kv_weight` as the attention layer needs them. The same
release's default path slices the rows by tp instead and pads the half heads with zeros (model_weights_loader.py warns
"has invalid shape"), and its safetensors path gives ranks the wrong head; both load, and neither computes the model.

Where FOLDER comes from: the Megatron weights were put under transformers' names (the logits of both models agree
within 5e-6 in fp32) and converted by TensorRT-LLM 0.14. That release knows no Nemotron: for nemotron.json the same
weights went through its GPT converter under Starcoder2's names, with the one added to the norms, which is what later
releases do. `config.json` then got `bias`, `hidden_act` and `architecture` of such a model; TensorRT-LLM loads it.
Neither does it know Qwen3: for qwen3.json and qwen3_moe.json the same weights went through its QWen converter under
Qwen2's names, with zero biases (and a zero shared expert) that were dropped again, the weights of the q/k norms added
and `config.json` made that of a later release. It cannot convert folders of tied models (llama_3_2, qwen2 and qwen3):
it was given the embedding as `lm_head.weight` too. Its path for a model in memory fails on biases of repeated key/value
heads: `dup_kv_weight` was called with them as columns.

The checkpoints of StarCoder, StarCoder2, Gemma, Gemma 2 and Falcon are those of tests/support/family_models.py, put
under transformers' names as NeMo's and Megatron-Bridge's mappings have them; all ran through the converter's path for a
model in memory. It takes Gemma from a folder, whose `hidden_act` was made "gelu" as published Gemmas have it, leaves
out its head, which is the embedding there, and can neither divide a vocabulary that tp does not divide nor repeat two
key/value heads for four ranks: gemma.json has one, gemma2.json four.

DeepSeek-V2 went through the converters of 0.15 and 0.16 (models/deepseek_v2/convert.py, with a transformers model in
memory), whose files their classes loaded. attention.fused_q_proj holds sums of eight products there, which every
processor rounds alike. The converters divide experts by the whole tp also where expert parallelism divides them
already, which their classes then refuse: a layout that does both has no record.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import struct
from pathlib import Path
from typing import Any

COMPUTED = re.compile(r"embed_positions|rotary_inv_freq")


def hash_tensors(path: Path) -> dict[str, dict[str, Any]]:
    """dtype, shape and SHA-256 of the raw bytes of every tensor of a safetensors file, by name."""
    content = path.read_bytes()
    (header_length,) = struct.unpack_from("<Q", content)
    header = json.loads(content[8 : 8 + header_length])
    data = memoryview(content)[8 + header_length :]
    return {
        name: {
            "dtype": entry["dtype"],
            "shape": entry["shape"],
            "sha256": hashlib.sha256(data[slice(*entry["data_offsets"])]).hexdigest(),
        }
        for name, entry in sorted(header.items())
        if name != "__metadata__" and not COMPUTED.search(name)
    }


def record_layout(folder: Path) -> dict[str, Any]:
    """The configuration and every rank's tensors of one export folder."""
    config = json.loads((folder / "config.json").read_text())
    ranks = [hash_tensors(folder / f"rank{rank}.safetensors") for rank in range(config["mapping"]["world_size"])]
    return {"config": config, "ranks": ranks}


def parse_option(text: str) -> tuple[str, int | float | bool | str]:
    """`key=value` with the value as JSON where it is JSON, otherwise as a string."""
    key, _, value = text.partition("=")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value


def main() -> None:
    """Write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("json", type=Path, help="file to write")
    parser.add_argument("folder", type=Path, help="folder of tp{T}pp{P} folders")
    parser.add_argument("--options", nargs="*", default=[], type=parse_option, metavar="KEY=VALUE")
    arguments = parser.parse_args()
    layouts = sorted(path for path in arguments.folder.iterdir() if re.fullmatch(r"tp\d+pp\d+(ep\d+)?", path.name))
    expected: dict[str, Any] = {"options": dict(arguments.options)} if arguments.options else {}
    expected["layouts"] = {path.name: record_layout(path) for path in layouts}
    arguments.json.write_text(_dump(expected))


def _dump(expected: dict[str, Any]) -> str:
    """JSON with one tensor per line."""
    text = json.dumps(expected, indent=1)
    return re.sub(r"\{\s+(\"dtype\"[^}]*?)\s+\}", lambda m: "{" + re.sub(r"\s+", " ", m[1]) + "}", text) + "\n"


if __name__ == "__main__":
    main()
