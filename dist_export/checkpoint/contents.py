"""What a checkpoint holds beside weights, and which Megatron wrote it, as far as names tell. Reads no data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from dist_export.checkpoint.archive import open_tar
from dist_export.checkpoint.index import CheckpointIndex

_TOKENIZERS = ("tokenizer", "nemo_tokenizer", "context/nemo_tokenizer")
_SIDE_FOLDERS = {
    "modelopt_state": "quantiser state (modelopt_state)",
    "hf": "a copy in Hugging Face format (hf)",
    "integrity.json": "checksums of the files (integrity.json)",
}
#: Argument -> Megatron-Core release that brought it, newest first.
_NEW_ARGUMENTS = (
    ("moe_mlp_glu_interleave_size", "0.18"),
    ("attention_output_gate", "0.16"),
    ("softmax_type", "0.15"),
    ("qk_l2_norm", "0.13"),
    ("mtp_num_layers", "0.12"),
    ("rope_scaling_factor", "0.11"),
    ("use_rope_scaling", "0.10"),
    ("rotary_base", "0.8"),
    ("qk_layernorm", "0.6"),
    ("add_qkv_bias", "0.5"),
    ("group_query_attention", "0.4"),
)


def generation(index: CheckpointIndex, arguments: Mapping[str, object] | None) -> str | None:
    """The oldest Megatron-Core release that can have written the checkpoint; None where nothing tells.

    Only for checkpoints of Megatron-LM: configurations of other trainers have other fields.
    """
    if "(" in index.format:
        return None
    if "common_state/shard_0_1" in index.objects:
        return "Megatron-Core 0.19 or later"
    found = next((release for name, release in _NEW_ARGUMENTS if name in (arguments or {})), None)
    if found is None:
        return "before Megatron-Core 0.4" if arguments else None
    return f"Megatron-Core {found} or later"


def contents(index: CheckpointIndex) -> list[str]:
    """What else is in there, one line each."""
    return [*_objects(index), *_files(index)]


def _objects(index: CheckpointIndex) -> Iterator[str]:
    random_states = sum(name.startswith("rng_state") for name in index.objects)
    if random_states:
        yield f"random number generators of {random_states} ranks"
    extra = sum("._extra_state" in name for name in index.objects)
    if extra:
        yield f"{extra} records of layers that are no weights (_extra_state), which are not opened"


def _files(index: CheckpointIndex) -> Iterator[str]:
    folder = index.folder
    if folder.is_file():
        tokenizers = sorted(name for name in open_tar(folder).files if "_tokenizer." in name)
        if tokenizers:
            yield f"tokenizer files ({', '.join(tokenizers[:3])})"
        return
    for name, what in _SIDE_FOLDERS.items():
        if (folder / name).exists():
            yield what
    top = folder.parent if folder.name in ("weights", "model_weights") else folder
    for name in _TOKENIZERS:
        if (top / name).is_dir():
            yield f"tokenizer files ({name})"
    tokenizers = sorted(path.name for path in top.glob("*_tokenizer.model"))
    if tokenizers:
        yield f"tokenizer files ({', '.join(tokenizers[:3])})"
