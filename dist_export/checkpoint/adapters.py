"""Checkpoints that hold adapters (LoRA and the like): told by their names, joined with the base they belong to.

Names: megatron/bridge/peft/adapter_wrapper.py, `AdapterWrapper.sharded_state_dict` (the wrapped module's own names, and
``adapter.`` behind them); NeMo 2 nemo/lightning/pytorch/callbacks/peft.py, `AdapterWrapper.sharded_state_dict`, the
same. What is saved are the adapters alone: megatron/bridge/training/checkpointing.py,
`apply_peft_adapter_filter_to_state_dict`; nemo/lightning/pytorch/callbacks/peft.py, `WrappedAdapterIO.save_checkpoint`.
"""

from __future__ import annotations

from msgspec import Struct

from dist_export.checkpoint.index import CheckpointIndex
from dist_export.checkpoint.joined_index import joined
from dist_export.errors import ExportError


class AdapterSettings(Struct, frozen=True):
    """What training said of the adapters in a checkpoint."""

    origin: str
    """The file that says it."""
    kind: str
    """``LoRA`` or ``CanonicalLoRA``."""
    alpha: float
    dim: int
    normalized_experts: bool
    """Adapters of experts have another rank than `dim` (``normalize_moe_lora``)."""
    query_blocks: bool | None
    """`CanonicalLoRA`: whether training added q, k and v as three blocks of a tp rank's rows instead of group by group;
    None when the file does not tell."""
    always_halves: bool
    """Every ``linear_fc1``'s rows are saved as the halves of each tp rank, whether the MLP is gated or not."""
    tp_size: int | None
    expert_tp_size: int | None
    glu_interleaved: bool
    """Training interleaved the rows of gate and up."""


def is_adapter(name: str) -> bool:
    """Whether a tensor belongs to an adapter."""
    return ".adapter." in name or ".lora_" in name


def adapter_names(index: CheckpointIndex) -> list[str]:
    """The tensors of a checkpoint that belong to adapters."""
    return [name for name in index.tensors if is_adapter(name)]


def refuse_adapters(index: CheckpointIndex) -> None:
    """`ExportError` when the tensors are adapters, alone or beside a model's."""
    adapters = adapter_names(index)
    if adapters:
        only = len(adapters) == len(index.tensors)
        what = "only adapter weights" if only else "a model and adapters that are not merged into it"
        raise ExportError(
            f"{index.folder}: holds {what} ({len(adapters)} tensors, such as {adapters[0]}). Merge them into the base "
            "model first and export the result"
        )


def check_whole(index: CheckpointIndex) -> None:
    """`ExportError` when a checkpoint holds nothing but adapters."""
    adapters = adapter_names(index)
    if adapters and len(adapters) == len(index.tensors):
        raise ExportError(
            f"{index.folder}: holds only adapter weights ({len(adapters)} tensors, such as {adapters[0]}); name the "
            "checkpoint of the model that they were trained on with --base, they are then merged into it"
        )


def with_base(adapters: CheckpointIndex, base: CheckpointIndex, *, iteration: object) -> CheckpointIndex:
    """One chunk table of a base model and the adapters of another checkpoint, which is at `iteration`.

    Raises `ExportError` when either does not hold what it should.
    """
    others = [name for name in adapters.tensors if not is_adapter(name)]
    if len(others) == len(adapters.tensors):
        raise ExportError(f"{adapters.folder}: --base {base.folder} is given, but this checkpoint holds no adapters")
    if others:
        raise ExportError(
            f"{adapters.folder}: holds weights beside its adapters ({len(others)} tensors, such as {others[0]}), so "
            "that it is not clear whose those of --base would be; leave --base away if it holds the whole model"
        )
    if adapter_names(base):
        raise ExportError(f"--base {base.folder}: holds adapters itself ({adapter_names(base)[0]})")
    where = {"folder": str(adapters.folder), "iteration": iteration if type(iteration) is int else None}
    return joined(base, adapters, adapters=where, origin=str(adapters.origin))
