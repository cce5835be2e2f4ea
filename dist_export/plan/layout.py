"""Target layouts: how many tensor- and pipeline-parallel ranks there are and what each holds."""

from __future__ import annotations

from collections.abc import Iterator

from msgspec import Struct

from dist_export.errors import ExportError
from dist_export.models.shard_ops import TensorParallel


class TargetLayout(Struct, frozen=True):
    """A tp x pp grid of target ranks. Rank order is tp fastest: ``rank = pp_rank * tp_size + tp_rank``.

    tensorrt_llm/mapping.py, class ``Mapping`` (context parallelism 1).
    """

    tp_size: int
    pp_size: int
    layers_per_stage: tuple[int, ...]
    """Number of layers of each pipeline stage; its length is `pp_size`."""
    moe_ep_size: int = 1
    """How many ways the tp ranks divide the experts of a layer among them; a divisor of `tp_size`."""

    def __post_init__(self) -> None:
        if self.tp_size < 1 or self.pp_size < 1 or len(self.layers_per_stage) != self.pp_size:
            raise ExportError(f"not a layout: tp {self.tp_size}, pp {self.pp_size}, stages {self.layers_per_stage}")
        if self.moe_ep_size < 1 or self.tp_size % self.moe_ep_size:
            raise ExportError(f"not a layout: tp {self.tp_size} is no multiple of moe ep {self.moe_ep_size}")

    @property
    def moe_tp_size(self) -> int:
        """How many ways each expert's weights are divided: moe tp x moe ep = tp."""
        return self.tp_size // self.moe_ep_size

    @property
    def world_size(self) -> int:
        return self.tp_size * self.pp_size

    def positions(self) -> Iterator[tuple[int, int]]:
        """(tp_rank, pp_rank) of every rank, in rank order."""
        return ((tp, pp) for pp in range(self.pp_size) for tp in range(self.tp_size))

    def tensor_parallel(self, rank: int) -> TensorParallel:
        """The position of `rank` on the tp axis."""
        return TensorParallel(rank % self.tp_size, self.tp_size)

    def expert_tensor_parallel(self, rank: int) -> TensorParallel:
        """The position of `rank` on the tp axis within an expert (moe_ep is the faster axis)."""
        return TensorParallel(rank % self.tp_size // self.moe_ep_size, self.moe_tp_size)

    def experts(self, rank: int, num_experts: int) -> range:
        """Global numbers of the experts that `rank` holds in each of its layers.

        Raises `ExportError` when they do not divide. Source: ``Mapping.ep_experts``.
        """
        if num_experts % self.moe_ep_size:
            raise ExportError(f"{num_experts} experts do not divide by moe ep {self.moe_ep_size}")
        count, part = num_experts // self.moe_ep_size, rank % self.tp_size % self.moe_ep_size
        return range(part * count, (part + 1) * count)

    def pp_rank(self, rank: int) -> int:
        """The pipeline stage of `rank`."""
        return rank // self.tp_size

    def layers(self, rank: int) -> range:
        """Global numbers of the layers that `rank` holds."""
        stage = self.pp_rank(rank)
        start = sum(self.layers_per_stage[:stage])
        return range(start, start + self.layers_per_stage[stage])

    def __str__(self) -> str:
        experts = f" (experts: tp {self.moe_tp_size} x ep {self.moe_ep_size})" if self.moe_ep_size > 1 else ""
        return f"tp {self.tp_size} x pp {self.pp_size}{experts}"
