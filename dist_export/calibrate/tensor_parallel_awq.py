"""AWQ over tensor-parallel ranks with one process's result.

ModelOpt (0.47, quantization/model_calib.py `awq_lite`) lets every rank search by its own part of a linear: statistics
of its own rows, a loss of its own outputs, scales normed by its own columns, and then averages over column-parallel
ranks. What is found so depends on the number of ranks, and ranks may settle on different exponents. Here the ranks
exchange what makes each know the whole linear: the weight's statistic before the search, the losses after it, and the
extremes of the scales. What is left is rounding.

Importing this module imports torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

from dist_export.calibrate.layout import BLOCK_COLUMNS
from dist_export.calibrate.places import Place
from dist_export.errors import ExportError

_HELPER = "awq_lite"
_NEEDED = ("act_scale", "weight_scale", "loss", "num_cache_steps", "num_search_steps", "is_enabled")


class TensorParallelAwq:
    """Exchanges what `awq_lite` keeps of each linear. Every rank of a tensor-parallel group makes the same calls."""

    def __init__(self, linears: Mapping[str, Any], places: Mapping[str, Place], group: Any) -> None:
        self.linears, self.places, self.group = linears, places, group
        self.size, self.rank = dist.get_world_size(group), dist.get_rank(group)

    def before_pass(self) -> None:
        """Before texts are run: before those of the search, the statistic of every weight whose rows are divided."""
        for name, linear in self.linears.items():
            if self._stage(linear) == "search" and _is_column_parallel(linear):
                whole = self._whole_weight(linear.weight, self.places[name])
                linear.awq_lite.weight_scale = _weight_statistic(whole)

    def after_pass(self) -> None:
        """After texts were run: after those of the search, the mean over all outputs of every loss."""
        for linear in self.linears.values():
            if self._stage(linear) == "done":
                losses = linear.awq_lite.loss
                together = torch.stack(list(losses.values()))
                dist.all_reduce(together, group=self.group)
                losses.update(zip(losses, together / self.size, strict=True))

    def scale(self, linear: Any) -> torch.Tensor | None:
        """By what ModelOpt is to smooth a weight's columns, None where it was not searched for."""
        helper = getattr(linear, _HELPER, None)
        if helper is None or not helper.is_enabled:
            return None
        activation, weight, exponent = helper.act_scale, helper.weight_scale, helper.best_alpha
        tiny = torch.finfo(torch.float32).tiny
        ratio = activation.pow(exponent) / (weight.to(activation.device).pow(1 - exponent) + tiny)
        scales = ratio.clamp(min=1e-4, max=1e4).view(-1)
        extremes = torch.stack((scales.max(), -scales.min()))
        if not _is_column_parallel(linear):
            dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=self.group)
        found: torch.Tensor = 1.0 / (scales / (extremes[0] * -extremes[1]).sqrt()).view(-1)
        return found

    def _stage(self, linear: Any) -> str:
        """Which pass is next: ``cache``, ``search``; ``done`` after both; ``""`` for linears that are not searched."""
        helper = getattr(linear, _HELPER, None)
        if helper is None:
            return ""
        missing = [name for name in _NEEDED if not hasattr(helper, name)]
        if missing:
            raise ExportError(
                f"this ModelOpt has no {', '.join(missing)} of AWQ: use release 0.47, or calibrate int4_awq with tp 1"
            )
        if not helper.num_cache_steps:
            return "cache"
        if not helper.is_enabled:
            return ""
        return "done" if helper.num_search_steps else "search"

    def _whole_weight(self, weight: torch.Tensor, place: Place) -> torch.Tensor:
        """All ranks' rows, in the order of the whole weight: each rank's part of gate follows the one before it."""
        parts = [torch.empty_like(weight) for _ in range(self.size)]
        dist.all_gather(parts, weight.detach().contiguous(), group=self.group)
        whole = torch.empty(weight.shape[0] * self.size, weight.shape[1], dtype=weight.dtype, device=weight.device)
        for rank, part in enumerate(parts):
            end = 0
            for own, size in place.rows:
                row = own + (rank - self.rank) * size
                whole[row : row + size] = part[end : end + size]
                end += size
        return whole


def _is_column_parallel(linear: Any) -> bool:
    from megatron.core.tensor_parallel import ColumnParallelLinear

    return isinstance(linear, ColumnParallelLinear)


def _weight_statistic(weight: torch.Tensor) -> torch.Tensor:
    """As `awq_lite`: of each column the mean of what its elements are to the largest of their block."""
    block, (rows, columns) = BLOCK_COLUMNS["int4_awq"], weight.shape
    blocks = torch.nn.functional.pad(weight, (0, -columns % block)).view(-1, block).abs()
    share = blocks / (blocks.amax(dim=1, keepdim=True) + torch.finfo(weight.dtype).tiny)
    return share.view(rows, -1)[:, :columns].mean(0).to(torch.float32)
