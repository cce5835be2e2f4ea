"""NeMo 1 ``.nemo``: a tar archive (or its folder) of model_config.yaml, tokenizer files and weights.

Weights are ``model_weights/`` (``torch_dist`` or ``zarr``) or state dict files per rank (nemo/collections/nlp/parts/
nlp_overrides.py, `NLPSaveRestoreConnector.save_to`). An archive is read in place: the table's one file is the archive,
and every offset is absolute in it. model_config.yaml becomes arguments as in nemo/collections/nlp/models/
language_modeling/megatron_gpt_model.py and megatron_base_model.py, `build_transformer_config`, `model_provider_func`.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dist_export.checkpoint import formats, torch_dist
from dist_export.checkpoint.adapters import refuse_adapters
from dist_export.checkpoint.archive import is_tar, open_tar
from dist_export.checkpoint.file_tree import FileTree, StoredFile
from dist_export.checkpoint.index import CheckpointIndex, check_extents
from dist_export.checkpoint.plain_text import MOST_BYTES, parse_yaml, plain
from dist_export.errors import ExportError

FORMAT = "NeMo 1"
CONFIG = "model_config.yaml"
WEIGHTS = "model_weights"
_MOST_METADATA = 4 << 30  # bytes of .metadata
_REFERENCE = re.compile(r"^\$\{\s*\.?([A-Za-z_][\w.]*)\s*\}$")
_MOST_REFERENCES = 16  # followed one after the other

#: `activation` of model_config.yaml without ``fast-`` -> function, gated (activation_to_func of utils_funcs.py).
_ACTIVATIONS = {
    "gelu": ("gelu", False),
    "approx-gelu": ("gelu_tanh", False),
    "squared-relu": ("squared_relu", False),
    "geglu": ("gelu", True),
    "reglu": ("relu", True),
    "swiglu": ("silu", True),
}
_NORMALIZATIONS = {"layernorm": "LayerNorm", "rmsnorm": "RMSNorm", "layernorm1p": "LayerNorm"}
#: Name in model_config.yaml -> name of the argument, value when it is not there.
_NAMES: dict[str, tuple[str, object]] = {
    "bias": ("add_bias_linear", True),
    "bias_activation_fusion": ("bias_activation_fusion", True),
    "layernorm_epsilon": ("layernorm_epsilon", 1e-5),
    "make_vocab_size_divisible_by": ("make_vocab_size_divisible_by", 128),
    "moe_router_topk": ("moe_router_topk", 2),
    "position_embedding_type": ("position_embedding_type", "learned_absolute"),
    "rotary_base": ("rotary_base", 10000),
    "rotary_percentage": ("rotary_percent", 1.0),
    "scale_positional_embedding": ("rope_scaling", False),
    "share_embeddings_and_output_weights": ("share_embeddings_and_output_weights", True),
}


def is_archive(path: Path) -> bool:
    """Whether a path is an archive."""
    return is_tar(path)


def is_nemo(path: Path) -> bool:
    """Whether a path is an archive, or a folder that was one."""
    return is_tar(path) or (path / CONFIG).is_file()


def read_index(path: Path) -> CheckpointIndex:
    """The chunk table of an archive or of its folder. Reads headers and metadata only (of a compressed archive: all).

    Raises `ExportError` as `archive.open_tar` and the formats of the weights do, and for adapters.
    """
    tree = _tree(path)
    if CONFIG not in tree.files:
        raise ExportError(f"{path}: an archive without {CONFIG}, so not a .nemo file")
    if tree.root == path:
        return _read_index(path, tree)
    with _named(tree.root, path):
        return _read_index(path, tree).copied_from(path.absolute())


def _read_index(path: Path, tree: FileTree) -> CheckpointIndex:
    index = _read_weights(path, tree)
    refuse_adapters(index)
    return index


@contextmanager
def _named(copy: Path, path: Path) -> Iterator[None]:
    """Errors about a temporary copy speak of the archive."""
    try:
        yield
    except ExportError as error:
        raise ExportError(str(error).replace(str(copy), str(path))) from error


def read_common_state(index: CheckpointIndex) -> Mapping[str, object]:
    """``args`` from model_config.yaml."""
    top = index.folder.parent if index.folder.name == WEIGHTS and index.folder.is_dir() else index.folder
    if top.is_file():
        tree = open_tar(top)
    else:
        tree = FileTree(top, {CONFIG: StoredFile(CONFIG, 0, (top / CONFIG).stat().st_size)})
    with _named(index.folder, index.origin):
        return {"args": _arguments(tree)}


def _arguments(tree: FileTree) -> dict[str, object]:
    config = parse_yaml(tree.read(CONFIG, most=MOST_BYTES), origin=tree.where(CONFIG))
    return config_arguments(config, origin=tree.where(CONFIG))


def _tree(path: Path) -> FileTree:
    return open_tar(path) if path.is_file() else FileTree.of_folder(path)


def _read_weights(path: Path, tree: FileTree) -> CheckpointIndex:
    about = f"{WEIGHTS}/metadata.json"
    if about not in tree.files:
        from dist_export.checkpoint.nemo_ranks import has_rank_files, read_rank_files

        if not has_rank_files(tree):
            raise ExportError(f"{path}: holds no weights ({WEIGHTS}/ or {WEIGHTS}.ckpt)")
        return read_rank_files(tree, _arguments(tree)).relabelled(f"{FORMAT} (legacy)")
    backend = torch_dist.backend_of(tree.read(about, most=MOST_BYTES))
    if backend == "zarr":
        from dist_export.checkpoint import zarr_dist

        return zarr_dist.read_tree(tree.below(WEIGHTS)).relabelled(f"{FORMAT} ({zarr_dist.FORMAT})")
    if path.is_dir():
        return formats.read_weights(path / WEIGHTS, FORMAT)
    if backend == torch_dist.FORMAT:
        return _torch_dist_inside(tree.root, tree.below(WEIGHTS))
    raise ExportError(f"{tree.where(about)}: names no format that can be read; torch_dist and zarr can")


def _torch_dist_inside(archive: Path, weights: FileTree) -> CheckpointIndex:
    """The table of a torch_dist folder in an archive: only ``.metadata`` is copied out, since a large one is parsed by
    another process."""
    with tempfile.TemporaryDirectory(prefix="dist_export-") as folder:
        weights.copy(".metadata", Path(folder) / ".metadata", most=_MOST_METADATA)
        with _named(Path(folder), Path(f"{archive}: {WEIGHTS}")):
            table = torch_dist.read_table(Path(folder))
    missing = [name for name in table.files if name not in weights.files]
    if missing:
        raise ExportError(f"{archive}: {WEIGHTS} lacks {', '.join(missing[:5])}, of which its metadata speaks")
    check_extents(table, ((number, weights.files[name].size) for number, name in enumerate(table.files)))
    bases = {name: weights.files[name].base for name in table.files}
    return table.moved_into(archive, bases, format_name=f"{FORMAT} ({torch_dist.FORMAT})")


def config_arguments(config: Mapping[str, Any], *, origin: str) -> dict[str, object]:
    """model_config.yaml as arguments. Fields that Megatron-Core knows by the same name are kept as they are.

    Raises `ExportError` for a ``${…}`` that is not another key of the same file, and for unknown activations and norms.
    """
    extra = config.get("mcore_customization_config")
    arguments: dict[str, object] = {}
    for name, value in config.items():
        if not isinstance(value, Mapping | list):
            arguments[name] = plain(_resolved(config, value, f"{origin}: {name}"))
        elif name in ("window_size", "moe_layer_freq"):
            arguments[name] = value
    for name, (argument, default) in _NAMES.items():
        value = arguments.pop(name, None)
        arguments[argument] = default if value is None else value
    arguments["tokenizer_type"] = _tokenizer(config.get("tokenizer"))
    _add_activation(arguments, origin)
    _add_normalization(arguments, origin)
    _add_sizes(arguments)
    arguments["untie_embeddings_and_output_weights"] = not arguments["share_embeddings_and_output_weights"]
    arguments["rope_scaling_factor"] = 8.0  # nemo/collections/common/parts/utils.py, `apply_rope_scaling`
    if isinstance(extra, Mapping):
        arguments |= {name: plain(value) for name, value in extra.items()}
    return arguments


def _resolved(config: Mapping[str, Any], value: object, where: str) -> object:
    """`value`, or what the key holds that it refers to."""
    for _ in range(_MOST_REFERENCES):
        if not isinstance(value, str) or "${" not in value:
            return value
        match = _REFERENCE.match(value)
        found: object = config if match else None
        for part in match[1].split(".") if match else ():
            found = found.get(part) if isinstance(found, Mapping) else None
        if found is None or isinstance(found, Mapping | list):
            break
        value = found
    raise ExportError(f"{where} is {value!r:.100}, which does not name another key of the file; write the value itself")


def _tokenizer(config: object) -> str | None:
    """What the tokenizer is, in words: its size is all that a model takes from it, and is not in the file."""
    if not isinstance(config, Mapping):
        return None
    words = (config.get("library"), config.get("model") or config.get("type"))
    return ", ".join(word.removeprefix("nemo:") for word in words if isinstance(word, str)) or None


def _add_activation(arguments: dict[str, object], origin: str) -> None:
    name = arguments.pop("activation", None) or "gelu"
    known = _ACTIVATIONS.get(name.removeprefix("fast-")) if isinstance(name, str) else None
    if known is None:
        raise ExportError(f"{origin}: activation is {name!r:.60}, expected one of {', '.join(_ACTIVATIONS)}")
    function, gated = known
    if arguments.pop("openai_gelu", False) is True:
        function = "openai_gelu"
    arguments |= {"activation_func": function, "gated_linear_unit": gated}


def _add_normalization(arguments: dict[str, object], origin: str) -> None:
    name = arguments.get("normalization") or "layernorm"
    known = _NORMALIZATIONS.get(name.lower()) if isinstance(name, str) else None
    if known is None:
        raise ExportError(f"{origin}: normalization is {name!r:.60}, expected one of {', '.join(_NORMALIZATIONS)}")
    arguments["normalization"] = known
    named = arguments.get("layernorm_zero_centered_gamma") is True  # an RMSNorm's way to say it, from NeMo 2.0 on
    arguments["layernorm_zero_centered_gamma"] = named or str(name).lower() == "layernorm1p"


def _add_sizes(arguments: dict[str, object]) -> None:
    """Sizes that are computed when they are left out. Megatron-Core models have as many learned positions as
    `encoder_seq_length` says."""
    hidden, heads = arguments.get("hidden_size"), arguments.get("num_attention_heads")
    if arguments.get("kv_channels") is None and type(hidden) is int and type(heads) is int and heads > 0:
        arguments["kv_channels"] = hidden // heads
    learned = arguments["position_embedding_type"] == "learned_absolute" and arguments.get("mcore_gpt") is True
    if arguments.get("max_position_embeddings") is None or (learned and "encoder_seq_length" in arguments):
        arguments["max_position_embeddings"] = arguments.get("encoder_seq_length")
