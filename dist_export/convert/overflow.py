"""The refusal of values that an element type cannot hold."""

from __future__ import annotations

from dist_export.errors import ExportError
from dist_export.plan.shard import PlannedTensor


def overflow_error(planned: PlannedTensor, num_lost: int, largest: float) -> ExportError:
    """`num_lost` finite values of a block became infinite; `largest` is their largest magnitude."""
    return ExportError(
        f"{planned.name}: {num_lost} values do not fit {planned.dtype} (largest here {largest:g}); "
        "export with --dtype bfloat16 or float32"
    )
