"""Plain ``torch.distributed.checkpoint`` folders: Megatron's ``torch_dcp`` and ``fsdp_dtensor``.

The whole nested state dict was saved with one key per leaf, its path joined by dots (`save_checkpoint` of
megatron/training/checkpointing.py, from 0.12): ``model.module.decoder.layers.0.…``, ``args``, ``iteration``. Metadata
and records are those of ``torch_dist``; there is no metadata.json and no common.pt, modules have their own names. Gated
linear_fc1 of ``fsdp_dtensor`` is two tensors, ``weight_w`` and ``weight_v`` (`handle_swiglu_in_state_dict` of
megatron/core/transformer/fsdp_dtensor_checkpoint.py); layers and, from 0.16, experts have global numbers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from dist_export.checkpoint import torch_dist
from dist_export.checkpoint.index import CheckpointIndex
from dist_export.checkpoint.index_builder import IndexBuilder
from dist_export.checkpoint.pickles import Record
from dist_export.checkpoint.torch_save import load_object
from dist_export.errors import ExportError

FORMAT = "torch_dcp"
_OWN_RECORDS = ("args", "iteration", "checkpoint_version")
"""Keys that a torch_dist checkpoint never has: there they lie in the common state."""
_EXPERT = "decoder.layers.{layer}.mlp.experts.experts.{expert}.{rest}"
_RENAMES = (
    # SequentialMLP: mlp.experts.local_experts.3.linear_fc1.weight
    re.compile(r"^decoder\.layers\.(?P<layer>\d+)\.mlp\.experts\.local_experts\.(?P<expert>\d+)\.(?P<rest>.+)$"),
    # TEGroupedMLP: mlp.experts.linear_fc1.weight3, and weight3_w where gate and up are apart
    re.compile(
        r"^decoder\.layers\.(?P<layer>\d+)\.mlp\.experts\.(?P<head>linear_fc[12]\.(?:weight|bias))(?P<expert>\d+)"
        r"(?P<tail>_[wv])?$"
    ),
)
_TRANSPOSED = re.compile(r"\.mlp\.experts\.weight[12]$")
_ADVICE = "load it with the training program and save it in the torch_dist format (--ckpt-format torch_dist)"


def is_dcp(folder: Path) -> bool:
    """Whether a folder has ``.metadata`` alone. So has an unfinished torch_dist checkpoint: reading tells."""
    return (folder / ".metadata").is_file() and not (folder / "metadata.json").exists()


def read_index(folder: Path) -> CheckpointIndex:
    """The chunk table under the names of ``torch_dist``, one tensor per layer and expert.

    Raises `ExportError` as `torch_dist.read_index` does; for a torch_dist checkpoint whose save did not finish; for
    pipeline-parallel saves, whose stages wrote different layers under the same names; for experts that are not all
    there.
    """
    unfinished = f"{folder}: has .metadata but no metadata.json, which Megatron writes last: the save did not finish"
    try:
        index = torch_dist.read_table(folder)
    except ExportError as error:
        raise ExportError(f"{unfinished}, or this is no checkpoint of any kind ({error})") from error
    if not any(name in index.objects for name in _OWN_RECORDS):
        raise ExportError(unfinished)
    torch_dist.check_files(index)
    table = _renamed(index)
    _check(folder, table, read_common_state(table).get("args"))
    return table


def read_common_state(index: CheckpointIndex) -> Mapping[str, object]:
    """``args``, ``iteration`` and ``checkpoint_version``, each of which is a record of its own."""
    found = {}
    for name in _OWN_RECORDS:
        record = index.objects.get(name)
        if record is not None:
            found[name] = load_object(index.path(record.file), record.offset, record.length)
    return found


def _renamed(index: CheckpointIndex) -> CheckpointIndex:
    builder = IndexBuilder(index.folder, FORMAT, chunks_are_records=True)
    for name in index.files:
        builder.file(name)
    builder.objects.update(index.objects)
    for reason, what in index.ignored.items():
        builder.ignore(reason, num_bytes=what.num_bytes, num_tensors=what.num_tensors)
    for name, info in index.tensors.items():
        chunks = index.chunks(name)
        if name.endswith("._extra_state"):  # bytes of TransformerEngine's layers, from its release 2 on
            builder.ignore("state of layers that is no weight", num_bytes=sum(chunk.length for chunk in chunks))
        else:
            builder.add(torch_dist_name(name), info.shape, info.dtype, chunks)
    return builder.build()


def torch_dist_name(name: str) -> str:
    """The name of a module's parameter as ``torch_dist`` has it; layer and expert numbers stay in it."""
    for pattern in _RENAMES:
        match = pattern.match(name)
        if match:
            parts = match.groupdict()
            rest = parts.get("rest") or parts["head"] + (parts["tail"] or "")
            return _EXPERT.format(layer=parts["layer"], expert=parts["expert"], rest=rest)
    return name


def _check(folder: Path, index: CheckpointIndex, args: object) -> None:
    transposed = next((name for name in index.tensors if _TRANSPOSED.search(name)), None)
    if transposed is not None:
        raise ExportError(
            f"{folder}: {transposed} holds all experts of GroupedMLP in transposed blocks, whose sizes are not saved; "
            + _ADVICE
        )
    arguments = args.state if isinstance(args, Record) else args
    if not isinstance(arguments, Mapping):
        return
    stages = arguments.get("pipeline_model_parallel_size")
    if isinstance(stages, int) and stages > 1:
        raise ExportError(
            f"{folder}: was saved with pipeline_model_parallel_size {stages}: every stage numbers its layers from 0, "
            f"so they overwrote one another; go back to the training run and {_ADVICE}"
        )
    wanted = arguments.get("num_experts")
    numbers = {int(n) for name in index.tensors for n in re.findall(r"\.experts\.experts\.(\d+)\.", name)}
    if isinstance(wanted, int) and wanted and numbers and numbers != set(range(wanted)):
        raise ExportError(
            f"{folder}: holds {len(numbers)} of {wanted} experts: before Megatron-Core 0.16 the ranks of an "
            f"expert-parallel save wrote theirs under the same names; {_ADVICE}"
        )
