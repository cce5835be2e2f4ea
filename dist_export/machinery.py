"""What a process converts with: arithmetic on a device, buffers within a budget. Torch is imported only when needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING

from msgspec import Struct

from dist_export.convert.choice import converter_for, device_of
from dist_export.convert.execute import Budget, Executor, Observer
from dist_export.convert.outputs import WritableFile
from dist_export.convert.scale_table import ScaleTable
from dist_export.convert.view_reader import ViewReader
from dist_export.plan.work import Fill, WorkItem
from dist_export.runtime.usage import num_op_threads

if TYPE_CHECKING:
    from dist_export.convert.torch_lanes import Lanes


class Resources(Struct, frozen=True, kw_only=True):
    """What a process may use. Memory is in bytes."""

    host_memory: int
    device_memory: int
    num_threads: int
    device: str
    """As asked for: ``auto``, ``cpu`` or a torch device."""
    local_rank: int
    local_world_size: int

    def torch_device(self) -> str:
        """The torch device of this process. Torch is imported here, where it is to be found out."""
        return device_of(self.device, self.local_rank)


def make_executor(
    outputs: Mapping[int, WritableFile],
    work: tuple[Sequence[WorkItem], Sequence[Fill]],
    reader: ViewReader,
    *,
    table: ScaleTable,
    resources: Resources,
    observer: Observer,
) -> Executor:
    """An executor for `work`, which writes to `outputs`, reads with the sources of `reader` and takes scales from
    `table`. Raises `ExportError` where torch is needed and not installed."""
    items, fills = work

    @cache
    def lanes() -> Lanes:
        from dist_export.convert.torch_lanes import lanes_on, share_cores

        share_cores(num_op_threads(resources.local_world_size, resources.num_threads))
        return lanes_on(resources.torch_device(), device_memory=resources.device_memory)

    computed = [use for item in items for use in item.uses if not use.output.planned.moves_only]
    cast = [use for use in computed if use.output.planned.recipe is None]
    is_encoded = len(cast) < len(computed) or any(fill.output.planned.is_small for fill in fills)
    converter = converter_for(cast, resources.device, lanes) if cast else None
    on_device = bool(converter and converter.in_flight) or (is_encoded and lanes().in_flight > 0)
    budget = Budget.within(
        resources.host_memory,
        num_threads=resources.num_threads,
        value_ops=bool(computed),
        device_memory=resources.device_memory if on_device else None,
    )
    executor = Executor(reader.sources, outputs, budget=budget, observer=observer)
    executor.converter, executor.reader = converter, reader
    if is_encoded:
        from dist_export.convert.encode import Encoder

        measured = ViewReader(reader.sources, reader.shape_of, reader.updates, table.rows)
        executor.encoder = Encoder(table, measured, lanes())
    return executor
