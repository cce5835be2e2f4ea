"""Queries of latent attention that take their keys in, with torch on the CPU.

The product is what TensorRT-LLM's converter computes (tensorrt_llm/models/deepseek_v2/convert.py, ``fused_q_proj``): an
einsum in the export's element type, summed in float32 and rounded once. One head is made at a time; a head's bits do
not depend on the others, so that tensor parallelism does not change them. Where a sum lies next to the middle between
two numbers, another processor or release of torch, which adds in another order, may round it the other way.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from dist_export.convert.overflow import overflow_error
from dist_export.convert.view_reader import ViewReader
from dist_export.plan.recipes import Absorbed
from dist_export.plan.shard import PlannedTensor
from dist_export.tensors.dtypes import DType
from dist_export.tensors.views import View


def absorbed_heads(planned: PlannedTensor, reader: ViewReader) -> Iterator[npt.NDArray[Any]]:
    """The bytes of a planned tensor, head by head.

    Raises `ExportError` where finite weights give a value that does not fit the element type.
    """
    recipe = planned.recipe
    assert isinstance(recipe, Absorbed), f"{planned.name} absorbs nothing"
    with _one_thread():
        for head in range(recipe.num_heads):
            yield _head(planned, recipe, reader, head)


@contextmanager
def _one_thread() -> Iterator[None]:
    """A head is too small to share among threads, least of all where other processes keep the cores busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _head(planned: PlannedTensor, recipe: Absorbed, reader: ViewReader, head: int) -> npt.NDArray[Any]:
    num_rows, num_nope = planned.view.shape[0] // recipe.num_heads, recipe.num_nope
    queries = _cast(planned, reader, planned.view, planned.source_dtype, (head * num_rows, num_rows))
    keys = _cast(planned, reader, recipe.keys, recipe.keys_dtype, (head * num_nope, num_nope))
    plain, rotated = queries[:num_nope], queries[num_nope:]
    product = torch.einsum("hdq,hdk->hkq", plain[None], keys[None])[0]
    _refuse_overflow(planned, product, plain, keys)
    return np.concatenate([part.contiguous().view(-1).view(torch.uint8).numpy() for part in (product, rotated)])


def _refuse_overflow(planned: PlannedTensor, product: torch.Tensor, queries: torch.Tensor, keys: torch.Tensor) -> None:
    """Values that are infinite though the weights are not are lost."""
    bits = product.view(torch.int16).numpy()
    exponent = bits.dtype.type(0x7C00 if product.dtype is torch.float16 else 0x7F80)
    if not ((bits & exponent) == exponent).any():  # much faster than torch.isfinite
        return
    if bool(torch.isfinite(queries).all()) and bool(torch.isfinite(keys).all()):
        lost = ~torch.isfinite(product)
        if not bool(lost.any()):  # half of a float32 may look so
            return
        largest = (keys.T.double() @ queries.double())[lost].abs().max()
        raise overflow_error(planned, int(lost.sum()), largest.item())


def _cast(planned: PlannedTensor, reader: ViewReader, view: View, dtype: DType, place: tuple[int, int]) -> torch.Tensor:
    """Rows (first, number) of a view in the export's element type."""
    raw = np.ascontiguousarray(reader.rows(view, dtype, (place[0], place[0] + place[1])))
    stored = torch.from_numpy(raw.view(f"i{dtype.itemsize}")).view(getattr(torch, dtype.name))
    if dtype is planned.dtype:
        return stored
    cast = stored.to(getattr(torch, planned.dtype.name))
    lost = torch.isinf(cast) & torch.isfinite(stored)
    if bool(lost.any()):
        raise overflow_error(planned, int(lost.sum()), stored[lost].abs().max().item())
    return cast
