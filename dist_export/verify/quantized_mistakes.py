"""What is wrong with codes and scales that differ: mistakes that are known to happen, tried out one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice

import numpy as np
from msgspec import Struct
from msgspec.structs import replace

from dist_export.checkpoint.quantizer_names import ModuleName
from dist_export.errors import ExportError
from dist_export.models.source_tensor import SourceTensor
from dist_export.plan.recipes import Encoded
from dist_export.plan.work import Use
from dist_export.tensors.dtypes import BFLOAT16, dtype_by_name
from dist_export.verify.compare import Difference
from dist_export.verify.merging import Float32, rounded, to_float32
from dist_export.verify.output import Block, OutputReader, Region
from dist_export.verify.quantized import QuantisedOutput
from dist_export.verify.quantized_formulas import Codes8, Form, Grain, e4m3, fp4_block_scales, packed
from dist_export.verify.quantized_names import Cells, Kind, Quantised
from dist_export.verify.source_reader import SourceReader

WINDOW_ROWS = 16  # of a weight that is looked at
MOST_LAYERS = 64  # nearest layers whose scales are tried


def _other_layers(quantised: QuantisedOutput, layer: int) -> Iterator[int]:
    num_layers = quantised.scales.quantization.logical.config.num_layers if layer >= 0 else 0
    others = (other for other in range(num_layers) if other != layer)
    return islice(sorted(others, key=lambda other: abs(other - layer)), MOST_LAYERS)


def _moved(weight: Quantised, layer: int, quantised: QuantisedOutput) -> Quantised | None:
    """A weight had it been made of another layer's modules."""
    uses, catalog = [], quantised.scales.quantization.logical.catalog
    for tensor, module, use in weight.uses:
        pattern = f"{module.pattern}.{tensor.slab.name.rpartition('.')[2]}"
        other = catalog.find(pattern, layer=layer, expert=module.expert)
        moved = replace(module, layer=layer)
        if other is None or other.shape != tensor.shape or moved not in quantised.scales.quantization.schemes:
            return None
        uses.append((other, moved, use))
    return Quantised(weight.output, uses, weight.companions)


def explain_scales(quantised: QuantisedOutput, weight: Quantised, kind: Kind, cells: Cells, found: Float32) -> str:
    """The first mistake that accounts for what a scale tensor holds in `cells`, empty when none does."""
    for mistake, values in _scale_guesses(quantised, weight, kind, cells):
        if values.shape == found.shape and np.array_equal(values, found):
            return mistake
    return ""


def _scale_guesses(
    quantised: QuantisedOutput, weight: Quantised, kind: Kind, cells: Cells
) -> Iterator[tuple[str, Float32]]:
    own = _at(quantised, weight, kind, cells)
    form = quantised.form(weight)
    assert own is not None and form is not None, "it has just been compared"
    layer = weight.modules()[0].layer
    yield "it is all zero", np.zeros_like(own)
    yield "it is all one, as if nothing had been calibrated", np.ones_like(own)
    swapped = _swapped_halves(weight)
    if swapped is not None:
        values = _at(quantised, swapped, kind, cells)
        if values is not None:
            yield "it is the scale of up where gate is meant, or of gate where up is", values
    if kind is Kind.SCALE and form.grain in (Grain.ROW, Grain.BLOCK):
        for values in _as_stored(quantised, weight, cells, form):
            yield "its amax is in the order of the training ranks (gate and up of each), not gate before up", values
    for other in _other_layers(quantised, layer):
        moved = _moved(weight, other, quantised)
        values = None if moved is None else _at(quantised, moved, kind, cells)
        if values is not None:
            yield f"it is that of layer {other}", values
    for twin in (Kind.SCALE, Kind.INPUT, Kind.SECOND):
        if twin is not kind and twin in weight.companions:
            values = _at(quantised, weight, twin, cells)
            if values is not None:
                yield f"it is the {twin.value}", values
    divisor = {Kind.INPUT: form.inputs, Kind.SECOND: form.second}.get(kind, form.divisor)
    if kind is not Kind.FACTOR:
        yield "it is the amax, not divided", own * np.float32(divisor)
        for each in (448.0, 240.0, 127.0, 128.0, 7.0, 8.0, 6.0, 2688.0):
            if each != divisor:
                other = own * np.float32(divisor) / np.float32(each)
                yield f"its amax is divided by {each:g}, not by {divisor:g}", other
    yield "it is the reciprocal of what it must be", np.float32(1) / own


def _at(quantised: QuantisedOutput, weight: Quantised, kind: Kind, cells: Cells) -> Float32 | None:
    """What `weight` makes of the tensor beside it in `cells`; None when it says nothing of them."""
    try:
        for place, values in quantised.companion_cells(weight, kind):
            if place == cells:
                return values
    except (ExportError, KeyError):
        pass  # the other has no such scale: not this mistake
    return None


def _swapped_halves(weight: Quantised) -> Quantised | None:
    """Gate in the place of up: what is stored as ``weight_w`` and ``weight_v``."""
    ends = {"weight_w": "weight_v", "weight_v": "weight_w"}
    uses = []
    for tensor, module, use in weight.uses:
        head, _, last = tensor.slab.name.rpartition(".")
        if last not in ends:
            return None
        other = replace(tensor, slab=replace(tensor.slab, name=f"{head}.{ends[last]}"))
        uses.append((other, module, use))
    return Quantised(weight.output, uses, weight.companions)


def _as_stored(quantised: QuantisedOutput, weight: Quantised, cells: Cells, form: Form) -> Iterator[Float32]:
    for tensor, module, use in weight.uses:
        amax, scheme = (
            quantised.scales.row_amax(module, tensor, in_order=False),
            quantised.scales.quantization.schemes[module],
        )
        stored = scheme.scheme if scheme.compressed else None
        for place, values in quantised.row_scales(tensor, use, form, amax, stored=stored):
            if place == cells:
                yield values


class _Window(Struct, frozen=True):
    """Rows of a source weight from the first that differs on, and the codes that the output has of them."""

    quantised: QuantisedOutput
    owner: Quantised
    tensor: SourceTensor
    module: ModuleName
    use: Use
    form: Form
    cells: Cells
    reader: SourceReader
    found: Codes8

    @property
    def is_block_scales(self) -> bool:
        return self.use.output is self.owner.companions.get(Kind.SCALE)

    def weights(self, tensor: SourceTensor | None = None) -> Float32:
        tensor, (top, bottom, left, right) = tensor or self.tensor, self.cells
        raw = self.reader.tensor(tensor, (top, bottom))[:, left:right]
        return to_float32(np.ascontiguousarray(raw), dtype_by_name(tensor.dtype))

    def scales(
        self,
        values: Float32,
        *,
        tensor: SourceTensor | None = None,
        together: Sequence[ModuleName] = (),
        in_order: bool = True,
    ) -> Float32:
        row = self.use.row + self.cells[0] - self.use.source[0]
        group = together or self.owner.modules(row)
        module = self.module if not together else replace(self.module, layer=together[0].layer)
        return self.quantised.spread_scales(tensor or self.tensor, module, group, values, self.cells, in_order=in_order)

    def stored(self, values: Float32, scales: Float32, codes: Callable[[Float32], Codes8] | None = None) -> Codes8:
        with np.errstate(all="ignore"):
            return packed((codes or self.form.codes)(values / scales), self.form)


def one_flipped_bit(differences: Sequence[Difference]) -> str:
    """Says so when a single element differs in a single bit: memory or disk, not a rule."""
    if sum(each.num_different for each in differences) != 1:
        return ""
    (found,) = [each for each in differences if each.num_different]
    mask = found.expected ^ found.found
    return "" if mask & (mask - 1) else f"one bit is flipped: mask 0x{mask:02x}"


def explain_codes(
    quantised: QuantisedOutput, difference: Difference, reader: OutputReader, sources: SourceReader
) -> str:
    """The first mistake that accounts for the codes of some rows, from the first that differs; empty when none does."""
    output = quantised.output.tensors[difference.tensor]
    if not isinstance(output.planned.recipe, Encoded) or output.planned.recipe.codes.are_stored:
        return ""
    owner = quantised.owner(output)
    row, column = difference.source
    for tensor, module, use in owner.uses:
        top, bottom, left, right = use.source
        if tensor.slab != difference.slab or not (top <= row < bottom and left <= column < right):
            continue
        form = quantised.scales.form(module)
        assert form is not None, "it has just been compared"
        first = row - (row - top) % form.rows_per_byte
        end = min(first + WINDOW_ROWS, bottom)
        here = replace(use, output=output)
        found = _read(reader, here, (first, end))
        window = _Window(quantised, owner, tensor, module, here, form, (first, end, left, right), sources, found)
        return next((mistake for mistake, codes in _guesses(window) if np.array_equal(codes, found)), "")
    return ""


def _read(reader: OutputReader, use: Use, rows: tuple[int, int]) -> Block:
    down, across = use.output.planned.packing
    top, _, left, right = use.source
    row, end = ((use.row + each - top) // down for each in rows)
    column = use.column // across
    return reader.read(use.output, Region((row, end), (column, column + (right - left) // across)))


def _guesses(window: _Window) -> Iterator[tuple[str, Codes8]]:
    """Mistake and the codes that it leaves, the particular before the general."""
    values = window.weights()
    if window.is_block_scales:
        yield from _block_scale_guesses(window, values)
        return
    scales = window.scales(values)
    right = window.stored(values, scales)
    yield "it is all zero", np.zeros_like(right)
    if window.form.rows_per_byte == 2 or window.form.columns_per_byte == 2:
        yield "the two codes of each byte are swapped", np.asarray((right >> 4) | (right << 4), np.uint8)
        yield "its codes have 8 added", right ^ np.uint8(0x88)
    for mistake, codes in _other_roundings(window.form):
        yield mistake, window.stored(values, scales, codes)
    with np.errstate(all="ignore"):
        multiplied, plain = window.form.codes(values * scales), window.form.codes(values)
    yield "its weights are multiplied by the scale, not divided", packed(multiplied, window.form)
    yield "its weights are not divided by a scale", packed(plain, window.form)
    if window.form.grain in (Grain.ROW, Grain.BLOCK):
        stored = window.scales(values, in_order=False)
        mistake = "quantised with amax in the order of the training ranks (gate and up of each), not gate before up"
        yield mistake, window.stored(values, stored)
    yield from _other_sources(window, values, scales)


def _other_sources(window: _Window, values: Float32, scales: Float32) -> Iterator[tuple[str, Codes8]]:
    """Codes of other weights, or by other scales."""
    swapped = _swapped_halves(window.owner)
    if swapped is not None:
        number = next(n for n, (tensor, _, _) in enumerate(window.owner.uses) if tensor.slab == window.tensor.slab)
        other = swapped.uses[number][0]
        weights = window.weights(other)
        yield "gate and up are swapped", window.stored(weights, window.scales(weights, tensor=other))
        yield (
            "quantised by the scales of up where gate is meant, or of gate where up is",
            window.stored(values, window.scales(values, tensor=other)),
        )
    row = window.use.row + window.cells[0] - window.use.source[0]
    for layer in _other_layers(window.quantised, window.module.layer):
        moved = _moved(window.owner, layer, window.quantised)
        if moved is None:
            continue
        number = next(n for n, (tensor, _, _) in enumerate(window.owner.uses) if tensor.slab == window.tensor.slab)
        other, together = moved.uses[number][0], moved.modules(row)
        yield (
            f"quantised by the scale of layer {layer}",
            window.stored(values, window.scales(values, tensor=other, together=together)),
        )
        weights = window.weights(other)
        yield (
            f"it holds the codes of layer {layer}",
            window.stored(weights, window.scales(weights, tensor=other, together=together)),
        )


def _block_scale_guesses(window: _Window, values: Float32) -> Iterator[tuple[str, Codes8]]:
    row = window.use.row + window.cells[0] - window.use.source[0]
    second = window.quantised.scalar(window.owner.modules(row))
    yield "it is all zero", np.zeros_like(window.found)
    yield "it is not divided by the weight's own scale", fp4_block_scales(values, np.float32(1))
    for layer in _other_layers(window.quantised, window.module.layer):
        moved = _moved(window.owner, layer, window.quantised)
        if moved is None:
            continue
        other = window.quantised.scalar(moved.modules(row))
        yield f"made with the scale of layer {layer}", fp4_block_scales(values, other)
        number = next(n for n, (tensor, _, _) in enumerate(window.owner.uses) if tensor.slab == window.tensor.slab)
        weights = window.weights(moved.uses[number][0])
        yield f"it is that of layer {layer}", fp4_block_scales(weights, other)
    swapped = window.found.reshape(-1)
    if len(swapped) % 2 == 0:
        right = fp4_block_scales(values, second)
        yield "its neighbours are swapped", right.reshape(-1, 2)[:, ::-1].reshape(right.shape)


def _other_roundings(form: Form) -> Iterator[tuple[str, Callable[[Float32], Codes8]]]:
    """The same quotients, made codes of in a wrong way."""
    if form.codes is e4m3:
        yield "values above 448 are not clamped", _e4m3_not_clamped
        yield "the quotients are rounded to bfloat16 first", lambda q: e4m3(to_float32(rounded(q, BFLOAT16), BFLOAT16))
        return
    if form.grain is Grain.FP4:
        return
    mask = 15 if form.rows_per_byte == 2 or form.words else 255
    wrapped = "values out of range are wrapped around, not clamped"
    yield wrapped, lambda q: np.asarray(np.rint(q).astype(np.int32) & mask, np.uint8)
    yield "values are cut off, not rounded to the nearest", lambda q: form.codes(np.trunc(q))


def _e4m3_not_clamped(quotients: Float32) -> Codes8:
    """Torch until 2.12: what rounds to more than 448 becomes NaN."""
    codes, large = e4m3(quotients), np.abs(quotients) > np.float32(464)
    result: Codes8 = np.where(large, (codes & 0x80) | 0x7F, codes).astype(np.uint8)
    return result
