"""Products of latent attention recomputed: queries that took the keys' projection in have no inverse.

Each is computed once more from the checkpoint, apart from the exporter's way: which rows belong to which head of which
rank is worked out from the model's sizes and not taken from the plan, and the sums are formed in float64 with numpy.
What is stored must be a rounding of the exact sum, allowing for the error that float32 additions in any order can have:
where that allows a single number, and nearly everywhere it does, the bits must be that number's. The rotated rows
beside the products must be those of the checkpoint, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from msgspec import Struct

from dist_export.errors import ExportError
from dist_export.models.rules import TargetRule
from dist_export.models.source_tensor import SourceTensor
from dist_export.plan.recipes import Absorbed
from dist_export.plan.work import OutputTensor
from dist_export.tensors.dtypes import DType, dtype_by_name
from dist_export.verify.findings import COVERAGE, REBUILD, Finding
from dist_export.verify.inverse import InverseRules, Place
from dist_export.verify.merging import rounded, to_float32
from dist_export.verify.output import Block, OutputReader, Region, TensorId
from dist_export.verify.source_reader import SourceReader

Float64 = npt.NDArray[np.float64]
Float32 = npt.NDArray[np.float32]
FLOAT32_ROUNDING = 2.0**-24
MOST_GATHERED = 4096  # elements whose bounds are computed one by one


class Product(Struct, frozen=True):
    """A product that the rules call for, and where it lies in the output."""

    output: OutputTensor
    layer: int
    heads: range
    """Of the model, those of the rank."""
    queries: SourceTensor
    keys_and_values: SourceTensor

    @property
    def key(self) -> TensorId:
        """(file, index)."""
        return self.output.key


class Products:
    """The products of one plan."""

    def __init__(self, inverse: InverseRules) -> None:
        self.inverse = inverse
        self.faults: list[Finding] = []
        """Products that are missing, of another shape, or that no rule calls for."""
        self.found: list[Product] = list(self._find())
        wanted = {product.key for product in self.found}
        for key, output in inverse.output.tensors.items():
            if isinstance(output.planned.recipe, Absorbed) and key not in wanted:
                self._fault(inverse.output.where(key), "is a product that no rule of the family makes")

    def _fault(self, where: str, message: str) -> None:
        self.faults.append(Finding(COVERAGE, where, message))

    def _find(self) -> Iterator[Product]:
        inverse = self.inverse
        rules = [rule for rule in inverse.output.plan.planner.rules if rule.absorbed and rule.when(inverse.config)]
        for rank in range(inverse.layout.world_size if rules else 0):
            for rule in rules:
                for layer in inverse.layout.layers(rank):
                    if rule.layers(inverse.config, layer):
                        yield from self._product(rule, layer, rank)

    def _product(self, rule: TargetRule, layer: int, rank: int) -> Iterator[Product]:
        inverse, config, tp = self.inverse, self.inverse.config, self.inverse.layout.tensor_parallel(rank)
        name = inverse.target_name(rule, Place(layer), rank)
        output = inverse.output.find(rank, name)
        if output is None:
            self._fault(f"target rank {rank}", f"has no tensor {name}")
            return
        queries, keys = (self._source(part.logical, layer) for part in rule.inputs)
        num_heads = config.num_attention_heads // tp.size
        rows = num_heads * (config.kv_lora_rank + config.qk_rope_head_size)
        if output.planned.shape != (rows, queries.shape[1]):
            expected = [rows, queries.shape[1]]
            self._fault(
                inverse.output.where(output.key), f"has shape {list(output.planned.shape)}, expected {expected}"
            )
            return
        yield Product(output, layer, range(tp.rank * num_heads, (tp.rank + 1) * num_heads), queries, keys)

    def _source(self, logical: str, layer: int) -> SourceTensor:
        located = self.inverse.logical.locate(logical, layer=layer)
        if located is None:
            raise ExportError(f"the checkpoint has no {logical.replace('{layer}', str(layer))}")
        return located.source

    def compare(self, product: Product, sources: SourceReader, reader: OutputReader) -> tuple[list[Finding], int]:
        """(what is wrong with a product, bytes compared). One finding at most."""
        config, planned = self.inverse.config, product.output.planned
        nope, rope, rank = config.qk_nope_head_size, config.qk_rope_head_size, config.kv_lora_rank
        rows = nope + rope, nope + config.value_head_size  # of a head in either source
        different, first, num_bytes = 0, "", 0
        for number, head in enumerate(product.heads):
            raw = _cast(sources, product.queries, (head * rows[0], rows[0]), planned.dtype)
            queries = to_float32(raw[:nope], planned.dtype)
            raw_keys = _cast(sources, product.keys_and_values, (head * rows[1], nope), planned.dtype)
            keys = to_float32(raw_keys, planned.dtype)
            top = number * (rank + rope)
            region = Region((top, top + rank + rope), (0, raw.shape[1]))
            found = reader.read(product.output, region)
            num_bytes += found.nbytes
            wrong = np.concatenate(
                [
                    _beyond(to_float32(found[:rank], planned.dtype), queries, keys, planned.dtype),
                    raw[nope:] != found[rank:],
                ]
            )
            if wrong.any() and not first:
                row, column = divmod(int(wrong.argmax()), wrong.shape[1])
                kind = f"latent {row}" if row < rank else f"rotated row {row - rank}"
                first = f"row {top + row}, column {column} (layer {product.layer}, head {head}, {kind})"
            different += int(wrong.sum())
        if not different:
            return [], num_bytes
        message = (
            f"{different} elements are not the product of {product.queries.slab} and {product.keys_and_values.slab}, "
            f"the first at {first}"
        )
        return [Finding(REBUILD, self.inverse.output.where(product.key), message)], num_bytes


def _cast(sources: SourceReader, tensor: SourceTensor, place: tuple[int, int], dtype: DType) -> Block:
    """Rows (first, number) of a source tensor, raw, rounded to the export's element type."""
    raw, stored = sources.tensor(tensor, (place[0], place[0] + place[1])), dtype_by_name(tensor.dtype)
    return raw if stored is dtype else rounded(to_float32(raw, stored), dtype)


def _beyond(found: Float32, queries: Float32, keys: Float32, dtype: DType) -> npt.NDArray[np.bool_]:
    """Where ``found [latents, inputs]`` is no rounding of the sum over d of key[d, latent] x query[d, input]."""
    with np.errstate(over="ignore", invalid="ignore"):
        exact: Float64 = keys.astype(np.float64).T @ queries.astype(np.float64)
        wrong: npt.NDArray[np.bool_] = _nearest(exact, dtype) != found
        if wrong.any():  # few, where nothing is wrong: those next to the middle between two numbers
            at = np.nonzero(wrong)
            wrong[at] = ~_within(found[at], exact[at], _magnitude(queries, keys, at), (queries.shape[0], dtype))
    return wrong


def _magnitude(queries: Float32, keys: Float32, at: tuple[npt.NDArray[np.intp], ...]) -> Float64:
    """The sums over the absolute products, of some elements."""
    few = at[0].size <= MOST_GATHERED
    rows, columns = np.abs(keys).astype(np.float64), np.abs(queries).astype(np.float64)
    found: Float64 = (rows[:, at[0]] * columns[:, at[1]]).sum(0) if few else (rows.T @ columns)[at]
    return found


def _within(found: Float32, exact: Float64, magnitude: Float64, of: tuple[int, DType]) -> npt.NDArray[np.bool_]:
    """Whether numbers are roundings of sums of `of[0]` products that were added in float32 in some order."""
    # One rounding per product and addition, and one of the bounds below, which pass through float32.
    error = (of[0] + 2) * FLOAT32_ROUNDING * magnitude + np.finfo(np.float32).tiny
    low, high = _nearest(exact - error, of[1]), _nearest(exact + error, of[1])
    within: npt.NDArray[np.bool_] = ((low <= found) & (found <= high)) | (np.isnan(exact) & np.isnan(found))
    return within


def _nearest(values: Float64, dtype: DType) -> Float32:
    return to_float32(rounded(values.astype(np.float32), dtype), dtype)
