"""Plain ``torch.distributed.checkpoint`` folders: Megatron's ``torch_dcp`` and ``fsdp_dtensor``.

The whole nested state dict was saved with one key per leaf, its path joined by dots (`save_checkpoint` of
megatron/training/checkpointing.py, from 0.12): ``model.module.decoder.layers.0.…``, ``args``, ``iteration``. Metadata
and records are those of ``torch_dist``; there is no metadata.json and no common.pt, modules have their own names. Gated
linear_fc1 of ``fsdp_dtensor`` is two tensors, ``weight_w`` and ``weight_v`` (`handle_swiglu_in_state_dict` of
megatron/core/transformer/fsdp_dtensor_checkpoint.py); layers and, from 0.16, experts have global numbers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from dist_export.checkpoint import torch_dist
from dist_export.checkpoint.index import CheckpointIndex, Chunk, ObjectRecord
from dist_export.checkpoint.index_builder import IndexBuilder
from dist_export.checkpoint.pickles import Record
from dist_export.checkpoint.torch_save import load_object
from dist_export.errors import ExportError

FORMAT = "torch_dcp"
FSDP_FORMAT = "fsdp_dtensor"
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
_NUMBERED = re.compile(r"(?P<start>.*\.experts\.experts\.)(?P<expert>\d+)\.(?P<rest>.+)")
_TOGETHER = re.compile(r"\.mlp\.experts\.(weight[12]|linear_fc[12]\.(weight|bias)(_[wv])?)$")
_HALF = re.compile(r"\.linear_fc1\.(weight|bias)_[wv]$")
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
    args = read_common_state(table).get("args")
    arguments = args.state if isinstance(args, Record) else args
    _check(folder, table, arguments)
    said = arguments.get("ckpt_format") if isinstance(arguments, Mapping) else None
    halves = any(_HALF.search(name) for name in table.tensors)
    return table.relabelled(FSDP_FORMAT) if said == FSDP_FORMAT or halves else table


def read_common_state(index: CheckpointIndex) -> Mapping[str, object]:
    """``args``, ``iteration`` and ``checkpoint_version``, each of which is a record of its own."""
    found = {}
    for name in _OWN_RECORDS:
        record = index.objects.get(name)
        if record is not None:
            found[name] = load_object(index.path(record.file), record.offset, record.length)
    args = found.get("args")
    if args is not None and not isinstance(args.state if isinstance(args, Record) else args, Mapping):
        where = index.path(index.objects["args"].file)
        raise ExportError(f"{where}: the record of args holds a {type(args).__name__} that is no saved arguments")
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
            _add_state(builder, name, chunks)
        else:
            builder.add(torch_dist_name(name), info.shape, info.dtype, chunks)
    return builder.build()


def _add_state(builder: IndexBuilder, name: str, chunks: Sequence[Chunk]) -> None:
    """A layer's state is an object here too, though a tensor of bytes holds it."""
    if len(chunks) == 1:
        builder.objects[name] = ObjectRecord(chunks[0].file, chunks[0].offset, chunks[0].length)
    else:
        builder.ignore("state of layers that is no weight", num_bytes=sum(chunk.length for chunk in chunks))


def torch_dist_name(name: str) -> str:
    """The name of a module's parameter as ``torch_dist`` has it; layer and expert numbers stay in it."""
    for pattern in _RENAMES:
        match = pattern.match(name)
        if match:
            parts = match.groupdict()
            rest = parts.get("rest") or parts["head"] + (parts["tail"] or "")
            return _EXPERT.format(layer=parts["layer"], expert=parts["expert"], rest=rest)
    return name


def _check(folder: Path, index: CheckpointIndex, arguments: object) -> None:
    together = next((name for name in index.tensors if _TOGETHER.search(name)), None)
    if together is not None:
        raise ExportError(
            f"{folder}: {together} holds all experts of a rank as one tensor (GroupedMLP, --moe-single-grouped-weight)"
            f", whose division among ranks and rows is not saved; {_ADVICE}"
        )
    if not isinstance(arguments, Mapping):
        return
    stages = arguments.get("pipeline_model_parallel_size")
    if isinstance(stages, int) and stages > 1:
        raise ExportError(
            f"{folder}: was saved with pipeline_model_parallel_size {stages}: every stage numbers its layers from 0, "
            f"so they overwrote one another; go back to the training run and {_ADVICE}"
        )
    wanted = arguments.get("num_experts")
    if isinstance(wanted, int) and wanted:
        _check_experts(folder, index, wanted)


def _check_experts(folder: Path, index: CheckpointIndex, wanted: int) -> None:
    """Every kind of tensor is there for every expert: which numbers are renamed depends on the release and the kind
    (`handle_experts_in_state_dict` of fsdp_dtensor_checkpoint.py: from 0.16, and of weights alone)."""
    found: dict[str, set[int]] = {}
    for name in index.tensors:
        match = _NUMBERED.fullmatch(name)
        if match:
            found.setdefault(f"{match['start']}{{expert}}.{match['rest']}", set()).add(int(match["expert"]))
    for kind, numbers in found.items():
        if numbers != set(range(wanted)):
            raise ExportError(
                f"{folder}: holds {kind} of {len(numbers)} of {wanted} experts: before Megatron-Core 0.16, and for "
                f"biases still, the ranks of an expert-parallel save write theirs under the same names; {_ADVICE}"
            )
