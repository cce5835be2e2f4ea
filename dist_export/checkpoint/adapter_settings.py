"""What trainers say of the adapters that they save: which kind, and how they are scaled.

Megatron-Bridge: ``peft`` in run_config.yaml (training/config.py, `ConfigContainer.peft`); NeMo 2: ``model_transform``
in context/model.yaml, with all defaults (nemo/collections/llm/api.py, `_set_with_io`; nemo/lightning/io/mixin.py,
`_ordered_arguments_with_default`). The scale is alpha / dim in both (megatron/bridge/peft/utils.py,
`ParallelLinearAdapter.forward`; nemo/collections/llm/peft/lora.py, `LoRAMerge`); dropout is not part of the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from dist_export.checkpoint import bridge, nemo2
from dist_export.checkpoint.adapters import AdapterSettings, adapter_names
from dist_export.checkpoint.index import CheckpointIndex
from dist_export.checkpoint.plain_text import plain
from dist_export.errors import ExportError

_KINDS = {"LoRA": "LoRA", "VLMLoRA": "LoRA", "CanonicalLoRA": "CanonicalLoRA"}
_INTERLEAVED = ("moe_mlp_glu_interleave_size", "moe_shared_expert_glu_interleave_size")


def adapter_settings(index: CheckpointIndex) -> AdapterSettings | None:
    """The settings of the adapters in a table, None where it has none. Reads the trainer's configuration.

    Raises `ExportError` when it does not say how the adapters are scaled, or for a kind that is no sum of a weight and
    a product (DoRA).
    """
    names = adapter_names(index)
    if not names:
        return None
    magnitudes = [name for name in names if name.endswith(".weight_magnitude")]
    if magnitudes:
        raise ExportError(
            f"{magnitudes[0]}: DoRA adapters rescale the rows of the merged weight, which is not supported; merge them "
            "with the trainer and export the result"
        )
    folder = Path(index.adapters["folder"]) if index.adapters else index.folder
    if (folder / bridge.CONFIG).is_file():
        section, model = bridge.adapter_section(folder)
        return _settings(section, model, folder / bridge.CONFIG, is_bridge=True)
    top = folder.parent
    if folder.name == "weights":
        section, model = nemo2.adapter_section(top)
        return _settings(section, model, top / "context" / "model.yaml", is_bridge=False)
    raise ExportError(
        f"{folder}: holds adapters ({len(names)} tensors, such as {names[0]}), but neither run_config.yaml "
        "(Megatron-Bridge) nor context/model.yaml (NeMo 2), which would say how they are scaled"
    )


def _settings(section: object, model: Mapping[str, object], path: Path, *, is_bridge: bool) -> AdapterSettings:
    name = "peft" if is_bridge else "model_transform"
    if not isinstance(section, Mapping):
        raise ExportError(
            f"{path}: says nothing of the adapters that the checkpoint holds ({name} is {section!r}), so that their "
            "scale alpha / dim is not known; merge them with the trainer and export the result"
        )
    target = str(section.get("_target_"))
    kind = _KINDS.get(target.rpartition(".")[2])
    if kind is None:
        raise ExportError(f"{path}: {name} is {target}; only LoRA and CanonicalLoRA can be merged, not this")
    alpha, dim = plain(section.get("alpha")), section.get("dim")
    if not isinstance(alpha, int | float) or type(dim) is not int or dim < 1:
        raise ExportError(f"{path}: {name} has alpha {alpha!r} and dim {dim!r}, expected a number and a size")
    # Until 0.2.2 Megatron-Bridge did what NeMo does; from 0.3 on q, k and v go to their groups' rows. Fields that
    # came with 0.5 prove that a file is later (canonical_lora.py, `LoRALinearSplitQKV.forward`).
    is_late = "normalize_moe_lora" in section
    return AdapterSettings(
        origin=str(path),
        kind=kind,
        alpha=float(alpha),
        dim=dim,
        normalized_experts=bool(section.get("normalize_moe_lora")),
        query_blocks=(False if is_late else None) if is_bridge else True,
        always_halves=not is_bridge,
        tp_size=_size(model.get("tensor_model_parallel_size")) if is_bridge else None,
        expert_tp_size=_size(model.get("expert_tensor_parallel_size")) if is_bridge else None,
        glu_interleaved=any(model.get(field) is not None for field in _INTERLEAVED),
    )


def _size(value: object) -> int | None:
    return value if type(value) is int else None
