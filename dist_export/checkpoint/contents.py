"""What a checkpoint holds beside weights, and which Megatron wrote it, as far as names and small records tell."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from dist_export.checkpoint.archive import open_tar
from dist_export.checkpoint.index import CheckpointIndex
from dist_export.checkpoint.pickles import Record, TensorRef
from dist_export.checkpoint.torch_save import load_object
from dist_export.errors import ExportError

_TOKENIZERS = ("tokenizer", "nemo_tokenizer", "context/nemo_tokenizer")
_SIDE_FOLDERS = {
    "modelopt_state": "quantiser state (modelopt_state)",
    "hf": "a copy in Hugging Face format (hf)",
    "integrity.json": "checksums of the files (integrity.json)",
}
_RANDOM_STATE = re.compile(r"rng_state(/.*|\.\d+)")  # torch_dist: one record per rank; DCP: one per field of each rank
_MOST_LOOKED_AT = 16
_EMPTY_STREAM = 4096  # bytes: TransformerEngine before 2 saves None as a stream of about a kilobyte
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
    """The oldest release that can have written the checkpoint; None where nothing tells.

    Of Megatron-Core for checkpoints of Megatron-LM, whose arguments grew; configurations of other trainers have other
    fields, of which NeMo's name their release.
    """
    arguments = arguments or {}
    if "(" in index.format:
        release = arguments.get("nemo_version")
        return f"NeMo {release}" if isinstance(release, str) and index.format.startswith("NeMo") else None
    if "common_state/shard_0_1" in index.objects:
        return "Megatron-Core 0.19 or later"
    found = next((release for name, release in _NEW_ARGUMENTS if name in arguments), None)
    if found is None:
        return "before Megatron-Core 0.4" if arguments else None
    classic = arguments.get("use_legacy_models") is True or arguments.get("use_mcore_models") is False
    return f"Megatron-Core {found} or later" + (", classic model (megatron.legacy.model)" if classic else "")


def contents(index: CheckpointIndex) -> list[str]:
    """What else is in there, one line each. Reads a few small records."""
    return [*_objects(index), *_files(index)]


def _objects(index: CheckpointIndex) -> Iterator[str]:
    ranks = {_RANDOM_STATE.match(name)[0] for name in index.objects if _RANDOM_STATE.match(name)}  # type: ignore[index]
    if ranks:
        yield f"random number generators of {len(ranks)} ranks"
    extra = sorted(name for name in index.objects if "._extra_state" in name)
    if extra:
        yield f"{len(extra)} records of layers that are no weights (_extra_state): {_state_of_layers(index, extra)}"


def _state_of_layers(index: CheckpointIndex, names: Sequence[str]) -> str:
    """What ``_extra_state`` records hold, by a look at one of each kind of layer."""
    kinds = {re.sub(r"\d+", "0", name.partition("/")[0]): name for name in names}
    try:
        if any(_holds_state(index, name) for name in list(kinds.values())[:_MOST_LOOKED_AT]):
            return "quantiser state of TransformerEngine or ModelOpt, not exported"
    except ExportError as error:
        return f"not readable ({error})"
    return "empty"


def _holds_state(index: CheckpointIndex, name: str) -> bool:
    """Whether a layer saved anything: TransformerEngine's do with FP8, as bytes; ModelOpt's with quantisers."""
    record = index.objects[name]
    path = index.path(record.file)
    with path.open("rb") as file:
        file.seek(record.offset)
        if file.read(4) != b"PK\x03\x04":  # of a legacy file: the bytes of the tensor themselves
            return record.length > 0
    value = load_object(path, record.offset, record.length)
    return any(map(_is_state, value if isinstance(value, list) else [value]))


def _is_state(value: object) -> bool:
    if isinstance(value, TensorRef):
        return 0 not in value.shape
    if isinstance(value, Record) and value.kind.endswith("BytesIO"):
        content = value.state[0] if isinstance(value.state, tuple) and value.state else b""
        return not isinstance(content, bytes) or len(content) > _EMPTY_STREAM
    return value is not None


def _files(index: CheckpointIndex) -> Iterator[str]:
    folder = index.folder
    if folder.is_file():
        names = set(open_tar(folder).files)
        if any(name.startswith("model_weights/modelopt_state/") for name in names):
            yield _SIDE_FOLDERS["modelopt_state"]
        tokenizers = sorted(name for name in names if "_tokenizer." in name)
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
