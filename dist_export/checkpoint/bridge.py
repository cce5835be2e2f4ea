"""Megatron-Bridge iteration folders: weights as Megatron-LM writes them, and run_config.yaml.

`run_config.yaml` (megatron/bridge/training/checkpointing.py, `save_checkpoint`; training/config.py,
`ConfigContainer.to_yaml`) describes the whole run; ``model`` is the model, all defaults written out. There are no
saved arguments. Gated rows that training interleaved are put in order before they are saved (training/checkpointing.py,
`_process_state_dict_for_model_glu_interleaving`), whatever the configuration says.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dist_export.checkpoint import formats
from dist_export.checkpoint.file_tree import FileTree, StoredFile
from dist_export.checkpoint.index import CheckpointIndex
from dist_export.checkpoint.plain_text import MOST_BYTES, parse_yaml
from dist_export.checkpoint.provider_config import provider_arguments
from dist_export.errors import ExportError

FORMAT = "Megatron-Bridge"
CONFIG = "run_config.yaml"
_STRAIGHTENED = ("moe_mlp_glu_interleave_size", "moe_shared_expert_glu_interleave_size")


def is_bridge(folder: Path) -> bool:
    """Whether an iteration folder has Megatron-Bridge's configuration beside its weights."""
    return (folder / CONFIG).is_file() and formats.weight_format(folder) is not None


def read_index(folder: Path) -> CheckpointIndex:
    """The chunk table, of a model or of adapters."""
    return formats.read_weights(folder, FORMAT)


def read_common_state(index: CheckpointIndex) -> Mapping[str, object]:
    """``args`` from run_config.yaml, and the iteration."""
    arguments = _model_arguments(index.folder, _run_config(index.folder))
    for name in _STRAIGHTENED:
        arguments.pop(name, None)
    return {"args": arguments, **_iteration(index)}


def adapter_section(folder: Path) -> tuple[object, Mapping[str, object]]:
    """(``peft``, the model's fields as arguments) of run_config.yaml."""
    document = _run_config(folder)
    return document.get("peft"), _model_arguments(folder, document)


def _run_config(folder: Path) -> dict[str, Any]:
    tree = FileTree(folder, {CONFIG: StoredFile(CONFIG, 0, (folder / CONFIG).stat().st_size)})
    return parse_yaml(tree.read(CONFIG, most=MOST_BYTES), origin=str(folder / CONFIG))


def _model_arguments(folder: Path, document: Mapping[str, Any]) -> dict[str, object]:
    model = document.get("model")
    if not isinstance(model, Mapping):
        raise ExportError(f"{folder / CONFIG}: has no model")
    return provider_arguments(model)


def _iteration(index: CheckpointIndex) -> dict[str, object]:
    saved = formats.inner_common(index).get("iteration")
    if type(saved) is int:
        return {"iteration": saved}
    named = re.fullmatch(r"iter_(\d{1,12})", index.folder.name)
    return {"iteration": int(named[1])} if named else {}
