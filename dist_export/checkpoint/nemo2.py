"""NeMo 2 folders: ``weights/`` (names with ``module.`` in front) and ``context/`` (model.yaml, io.json).

The configuration is ``context/model.yaml`` (nemo/lightning/io/mixin.py, `IOMixin.io_dump`): the class and every field
of the model's configuration, defaults included. io.json leaves defaults out, so that only the code of the same
release could complete it: it proves nothing here. Weights: nemo/lightning/pytorch/strategies/megatron_strategy.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dist_export.checkpoint import formats
from dist_export.checkpoint.file_tree import FileTree, StoredFile
from dist_export.checkpoint.index import CheckpointIndex
from dist_export.checkpoint.plain_text import MOST_BYTES, parse_yaml
from dist_export.checkpoint.provider_config import provider_arguments
from dist_export.errors import ExportError

FORMAT = "NeMo 2"


def is_nemo2(folder: Path) -> bool:
    """Whether a folder, or the folder that it is the ``weights`` of, is a NeMo 2 checkpoint."""
    top = _top(folder)
    return (top / "weights").is_dir() and ((top / "context").is_dir() or (top / "io.json").is_file())


def read_index(folder: Path) -> CheckpointIndex:
    """The chunk table, of a model or of adapters. Raises `ExportError` for saves that did not finish."""
    top = _top(folder)
    marker = top.with_name(top.name + "-unfinished")
    if marker.exists():
        raise ExportError(f"{top}: the save did not finish: {marker.name} is still beside it")
    return formats.read_weights(top / "weights", FORMAT)


def read_common_state(index: CheckpointIndex) -> Mapping[str, object]:
    """``args`` from model.yaml and, where Lightning saved it, the iteration."""
    top, common = index.folder.parent, formats.inner_common(index)
    step = common.get("global_step")
    found: dict[str, object] = {"iteration": step} if type(step) is int else {}
    config = top / "context" / "model.yaml"
    if config.is_file():
        found["args"] = provider_arguments(_model_config(_model(config), config))
    return found


def adapter_section(top: Path) -> tuple[object, Mapping[str, object]]:
    """(``model_transform``, the model's fields as arguments) of context/model.yaml."""
    path = top / "context" / "model.yaml"
    if not path.is_file():
        raise ExportError(f"{path}: missing; it would say how the adapters of the checkpoint are scaled")
    model = _model(path)
    return model.get("model_transform"), provider_arguments(_model_config(model, path))


def _top(folder: Path) -> Path:
    inside = folder.name == "weights" and (folder.parent / "context").is_dir()
    return folder.parent if inside else folder


def _model(path: Path) -> dict[str, Any]:
    tree = FileTree(path.parent, {path.name: StoredFile(path.name, 0, path.stat().st_size)})
    return parse_yaml(tree.read(path.name, most=MOST_BYTES), origin=str(path))


def _model_config(model: Mapping[str, Any], path: Path) -> dict[str, Any]:
    config = model.get("config")
    if not isinstance(config, dict):
        raise ExportError(f"{path}: has no config of a model")
    return config
