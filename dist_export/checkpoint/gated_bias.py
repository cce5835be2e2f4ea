"""Gated biases whose rows are in the order of the training ranks, as Megatron-Core up to 0.7 saved them.

It cut ``linear_fc1.weight`` into gate and up and saved all gates before all ups, but joined the ranks' ``[gate; up]``
biases one after the other (megatron/core/transformer/mlp.py, ``_sharded_state_dict_for_glu``; 0.8 cuts both). Names
and shapes are those of today; what tells are the chunks: those of the bias are twice as long as those of the weight.
"""

from __future__ import annotations

from dist_export.checkpoint.index import CheckpointIndex
from dist_export.errors import Faults

_BIAS = ".linear_fc1.bias"


def check_gated_biases(index: CheckpointIndex) -> None:
    """`ExportError` naming the biases whose halves are not gate and up."""
    faults = Faults(f"{index.folder}: biases of gated layers as Megatron-Core up to 0.7 saved them")
    for name in index.tensors:
        weight = name.removesuffix("bias") + "weight"
        if name.endswith(_BIAS) and weight in index.tensors:
            rows, weight_rows = _longest(index, name, -1), _longest(index, weight, -2)
            if rows == 2 * weight_rows and rows < index.tensors[name].shape[-1]:
                faults.add(
                    f"{name}: every {rows} rows are a training rank's gate and up, not the gates of all ranks and then "
                    "the ups; load it with that release and save it again with a newer one, or with tp 1"
                )
    faults.raise_if_any()


def _longest(index: CheckpointIndex, name: str, dim: int) -> int:
    """Largest size of a chunk along a dim; 0 where the tensor has no such dim."""
    if len(index.tensors[name].shape) < -dim:
        return 0
    return max((chunk.box.size[dim] for chunk in index.chunks(name)), default=0)
