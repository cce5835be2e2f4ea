"""Calibration files: amax values and factors of quantisers in one safetensors file, under Megatron's names.

``decoder.layers.3.self_attention.linear_qkv.input_quantizer._amax`` and its like, as ModelOpt names them in a
checkpoint; any trainer or script can write one with ``safetensors.torch.save_file``.
"""

from __future__ import annotations

from pathlib import Path

from dist_export.checkpoint.index import CheckpointIndex, Chunk
from dist_export.checkpoint.index_builder import IndexBuilder
from dist_export.checkpoint.joined_index import joined
from dist_export.checkpoint.quantizer_names import quantizer_tensor
from dist_export.errors import ExportError, Faults
from dist_export.tensors.boxes import Box
from dist_export.tensors.safetensors_format import read_header

FORMAT = "calibration"


def with_calibration(index: CheckpointIndex, path: Path) -> CheckpointIndex:
    """The chunk table of a checkpoint with the tensors of a calibration file.

    Raises `ExportError` for a file that is no such thing, tensors that are of no quantiser, and such as the checkpoint
    has already.
    """
    builder = IndexBuilder(path.absolute().parent, FORMAT, chunks_are_records=False)
    faults = Faults(f"{path}: not a calibration file for this checkpoint")
    try:
        header = read_header(path)
    except OSError as error:
        raise ExportError(f"{path}: {error.strerror}") from error
    number = builder.file(path.name)
    for name, stored in header.items():
        if quantizer_tensor(name) is None:
            faults.add(f"{name} is no tensor of a quantizer")
        elif name in index.tensors:
            faults.add(f"{name} is in the checkpoint, too")
        else:
            chunk = Chunk(Box.whole(stored.shape), number, stored.offset, stored.num_bytes)
            builder.add(name, stored.shape, stored.dtype.name, [chunk])
    if not header:
        faults.add("it holds no tensors")
    faults.raise_if_any()
    return joined(index, builder.build())
