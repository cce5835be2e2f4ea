"""``--master-weights``: the fp32 weights that the optimizer kept, in place of the model's own.

In the shapes of the model, under ``optimizer.state.fp32_param.<model key>``, they are saved by
`Float16OptimizerWithFloat16Params.sharded_state_dict` (megatron/core/optimizer/optimizer.py) and by the distributed
optimizer's ``fully_reshardable`` format (distrib_optimizer.py, `sharded_param_state_fully_reshardable`); several
optimizers in one put ``chained_N.`` in front (`ChainedOptimizer.sharded_state_dict`). ``fully_sharded_model_space`` of
Megatron-Core 0.8 to 0.15 has the same keys and flat pieces under them; ``dp_reshardable`` and its predecessors save
buckets in which parameters lie one after the other, without a name. Weights that the model itself keeps in fp32 have no
copy in the optimizer and are taken from the model.
"""

from __future__ import annotations

import math
import re
from pathlib import Path

from dist_export.checkpoint import torch_dist
from dist_export.checkpoint.ignored import ignored_reason
from dist_export.checkpoint.index import CheckpointIndex, without_wrapper_prefix
from dist_export.checkpoint.isolation import IN_PROCESS_BYTES, ParseLimits, in_child
from dist_export.checkpoint.metadata_records import Metadata, TensorStorageMetadata
from dist_export.checkpoint.pickles import load_metadata_pickle
from dist_export.errors import ExportError, Faults
from dist_export.tensors.dtypes import dtype_by_name

_MASTER = re.compile(r"^(?:chained_\d+\.)?optimizer\.state\.fp32_param\.(?P<key>.+)$")
_BUCKETS = re.compile(r"^(?:chained_\d+\.)?optimizer\.distributed\.")
_REPLACED = "the model's own weights, in place of which the optimizer's are taken"
_ADVICE = "export without --master-weights, or save again with a format that keeps them in the model's shapes"


def with_master_weights(index: CheckpointIndex) -> CheckpointIndex:
    """The same checkpoint with fp32 weights out of the optimizer's state. Reads ``.metadata`` again, never weights.

    Raises `ExportError` with the reason where there are none, or none in the shapes of the model.
    """
    inner = index.format.partition("(")[2].rstrip(")") or index.format
    if inner != torch_dist.FORMAT or not index.folder.is_dir():
        raise ExportError(
            f"{index.folder}: --master-weights: {index.format} checkpoints keep the optimizer's weights flattened, by "
            f"rank or not at all; only torch_dist can have them in the model's shapes"
        )
    path = index.folder / ".metadata"
    num_bytes = path.stat().st_size
    if num_bytes > IN_PROCESS_BYTES:
        limits = ParseLimits.for_size(num_bytes)
        (table,) = in_child(packed_table, [[str(index.folder.absolute())]], names=[str(path)], limits=limits)
        found = CheckpointIndex.from_buffer(table, origin=str(path))
    else:
        found = _read_table(index.folder)
    torch_dist.check_files(found)
    return found.relabelled(index.format)


def packed_table(folder: str) -> bytes:
    """In the child of `isolation`: the table as a buffer."""
    return _read_table(Path(folder)).to_bytes()


def _read_table(folder: Path) -> CheckpointIndex:
    path = folder / ".metadata"
    metadata = load_metadata_pickle(path.read_bytes(), origin=str(path))
    num_bytes = _exchange(metadata, folder)
    header, columns = torch_dist.build_index(folder, metadata).parts
    ignored = {**header["ignored"], _REPLACED: [len(num_bytes), sum(num_bytes)]}
    return CheckpointIndex({**header, "ignored": ignored}, columns)


def _exchange(metadata: Metadata, folder: Path) -> list[int]:
    """Give the masters the names of the model's tensors, and take those out, in place. Returns the latter's sizes."""
    entries = metadata.state_dict_metadata
    tensors = {key: each for key, each in entries.items() if isinstance(each, TensorStorageMetadata)}
    masters = {without_wrapper_prefix(found["key"]): key for key in tensors if (found := _MASTER.match(key))}
    weights = {name: key for key in tensors if not ignored_reason(name := without_wrapper_prefix(key))}
    if not masters:
        raise ExportError(f"{folder}: --master-weights: {_reason(tensors)}; {_ADVICE}")
    faults = Faults(f"{folder}: --master-weights: {_ADVICE}")
    for name, key in masters.items():
        _check(tensors, name, key, weights.get(name), faults)
    for name, key in weights.items():
        if name not in masters and tensors[key].properties.dtype.removeprefix("torch.") != "float32":
            faults.add(f"{name}: the optimizer has no fp32 copy of it")
    faults.raise_if_any()
    sizes = [_num_bytes(tensors[weights[name]]) for name in masters]
    for name, key in masters.items():
        del entries[weights[name]]
        entries[name] = entries.pop(key)
    renamed = {key: name for name, key in masters.items()}
    replaced = {weights[name] for name in masters} - set(renamed)
    for place in [place for place in metadata.storage_data if place.fqn in replaced]:
        del metadata.storage_data[place]
    for place in metadata.storage_data:
        place.fqn = renamed.get(place.fqn, place.fqn)
    return sizes


def _num_bytes(tensor: TensorStorageMetadata) -> int:
    return math.prod(tensor.size) * dtype_by_name(tensor.properties.dtype.removeprefix("torch.")).itemsize


def _check(
    tensors: dict[str, TensorStorageMetadata], name: str, key: str, weight: str | None, faults: Faults
) -> None:
    master = tensors[key]
    if weight is None:
        faults.add(f"{key}: the model has no {name}")
    elif tuple(master.size) != tuple(tensors[weight].size):
        own = list(tensors[weight].size)
        faults.add(f"{key}: saved flattened, as {list(master.size)}; the model's tensor is {own}")
    elif (dtype := master.properties.dtype.removeprefix("torch.")) != "float32":
        faults.add(f"{key}: is {dtype}, expected float32")


def _reason(tensors: dict[str, TensorStorageMetadata]) -> str:
    """Why there are no masters."""
    buckets = next((key for key in tensors if _BUCKETS.match(key)), None)
    if buckets:
        return f"the distributed optimizer saved its weights in flattened buckets without names, such as {buckets}"
    state = next((key for key in tensors if ignored_reason(key) == "optimizer state"), None)
    if state:
        return f"the optimizer's state has no fp32 weights, only others, such as {state}"
    return "the checkpoint has no optimizer state"
