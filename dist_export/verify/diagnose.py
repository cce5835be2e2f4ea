"""What is wrong with a tensor that differs: mistakes that are known to happen, tried out one by one.

Each hypothesis says what the tensor would hold had that mistake been made, as a planned tensor of its own; it is
compared with the file, and a wrong guess is dropped at its first differing block.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from dist_export.convert.sources import SourceFiles
from dist_export.errors import ExportError
from dist_export.models.rules import Input, Scope, TargetRule
from dist_export.models.shard_ops import TensorParallel
from dist_export.models.value_ops import ValueOp, ValueOps
from dist_export.plan.shard import PlannedTensor
from dist_export.plan.work import OutputTensor, SlabUses, Use, flat_rectangle, slab_shape
from dist_export.tensors.boxes import Box
from dist_export.tensors.views import Piece, Slab, View, concatenate
from dist_export.verify.compare import Comparer, Difference, choose_converter
from dist_export.verify.inverse import InverseRules
from dist_export.verify.output import OutputReader, Region


@dataclass(frozen=True, slots=True)
class Suspect:
    """A target tensor that differs, and what should have made it."""

    inverse: InverseRules
    output: OutputTensor
    rule: TargetRule
    layer: int
    """Global layer number, -1 outside the layers."""
    rank: int
    """Target rank."""
    differences: tuple[Difference, ...]

    @property
    def planned(self) -> PlannedTensor:
        return self.output.planned

    @property
    def tp(self) -> TensorParallel:
        return self.inverse.layout.tensor_parallel(self.rank)

    def shard(self, part: Input, *, layer: int | None = None, tp_rank: int | None = None) -> View:
        """What an input gives to a rank: by default to this one, of this layer."""
        layer = self.layer if layer is None else layer
        tensor = self.inverse.logical.find(part.logical, layer=layer)
        view = tensor.view if tensor else View.zeros(self.inverse.logical_shape(part, layer))
        tp = self.tp if tp_rank is None else TensorParallel(tp_rank, self.tp.size)
        return part.shard.take(view, tp, self.inverse.config)

    def holding(self, shards: Sequence[View]) -> PlannedTensor | None:
        """The tensor had it been made of `shards`; None when that has another shape or is what it should be."""
        view = concatenate(shards, 0)
        if view.shape != self.planned.view.shape or view == self.planned.view:
            return None
        return replace(self.planned, view=view)


@dataclass(frozen=True, slots=True)
class Guess:
    """A mistake and what the tensor would hold had it been made; None when the differences alone prove it."""

    mistake: str
    planned: PlannedTensor | None


Hypothesis = Callable[[Suspect], Iterator[Guess]]


def _guess(mistake: str, planned: PlannedTensor | None) -> Iterator[Guess]:
    if planned is not None:
        yield Guess(mistake, planned)


def one_flipped_bit(suspect: Suspect) -> Iterator[Guess]:
    """A single element differs in a single bit: memory or disk, not a rule."""
    if sum(each.num_different for each in suspect.differences) != 1:
        return
    (found,) = [each for each in suspect.differences if each.num_different]
    mask = found.expected ^ found.found
    if mask & (mask - 1):
        return
    row, column = found.target
    if suspect.planned.transposed:
        row, column = column, row
    width = suspect.planned.shape[-1] if suspect.planned.shape else 1
    place = suspect.output.offset + (row * width + column) * suspect.planned.dtype.itemsize
    place += (mask.bit_length() - 1) // 8  # little-endian: the byte within the element
    yield Guess(f"one bit is flipped: mask 0x{mask >> (mask.bit_length() - 1) // 8 * 8:02x} at byte {place}", None)


def never_written(suspect: Suspect) -> Iterator[Guess]:
    """All zeros."""
    yield from _guess("it is all zero", suspect.holding([View.zeros(suspect.planned.view.shape)]))


def leaked_padding(suspect: Suspect) -> Iterator[Guess]:
    """Rows that should be zero hold what the checkpoint's padding rows have."""
    pieces = suspect.planned.view.pieces
    slabs = {piece.slab for piece in pieces if piece.slab}
    if len(slabs) != 1 or all(piece.slab for piece in pieces):
        return
    (slab,) = slabs
    whole, rows = slab_shape(slab, suspect.inverse.catalog.tensors), suspect.planned.view.shape[0]
    if whole[0] != suspect.inverse.config.padded_vocab_size:
        return
    padded = suspect.tp.size * rows
    kept = View.of(slab, whole).narrow(0, 0, min(padded, whole[0])).pad(0, padded)
    mistake = "the checkpoint's padding rows of the vocabulary leaked into rows that must be zero"
    yield from _guess(mistake, suspect.holding([kept.narrow(0, suspect.tp.rank * rows, rows)]))


_NORM_VALUES: tuple[tuple[tuple[ValueOp, ...], str], ...] = (
    ((), "stored as in the checkpoint"),
    ((ValueOp.ADD_ONE,), "with one added"),
    ((ValueOp.ADD_ONE, ValueOp.ADD_ONE), "with one added twice"),
    ((ValueOp.SUBTRACT_ONE,), "with one subtracted"),
)


def wrong_norm_offset(suspect: Suspect) -> Iterator[Guess]:
    """The one of zero-centred norms is missing, doubled or not wanted."""
    if not any(part.logical.endswith("norm.weight") for part in suspect.rule.inputs):
        return
    meant = dict(_NORM_VALUES).get(suspect.planned.values, "otherwise")
    for values, text in _NORM_VALUES:
        if values != suspect.planned.values:
            missing = " (the +1 is missing)" if (values, suspect.planned.values) == ((), (ValueOp.ADD_ONE,)) else ""
            mistake = f"its norm weights are {text}, they must be {meant}{missing}"
            yield Guess(mistake, replace(suspect.planned, values=values))


def not_transposed(suspect: Suspect) -> Iterator[Guess]:
    """A square weight stored the wrong way round."""
    shape = suspect.planned.view.shape
    if len(shape) == 2 and shape[0] == shape[1]:
        word = "is not" if suspect.planned.transposed else "is"
        yield Guess(f"it {word} transposed", replace(suspect.planned, transposed=not suspect.planned.transposed))


SWAPS = (
    ("attention.query", "attention.key"),
    ("attention.key", "attention.value"),
    ("attention.query", "attention.value"),
    ("mlp.gate", "mlp.up"),
)


def swapped_parts(suspect: Suspect) -> Iterator[Guess]:
    """Query and key, gate and up and the like taken for one another."""
    for first, second in SWAPS:
        names = f"{first.split('.')[-1]} and {second.split('.')[-1]} are swapped"
        inputs = list(suspect.rule.inputs)
        here = [n for n, part in enumerate(inputs) if f".{first}." in part.logical or f".{second}." in part.logical]
        if len(here) == 2:  # both in this tensor: in the other order
            inputs[here[0]], inputs[here[1]] = inputs[here[1]], inputs[here[0]]
            yield from _guess(names, suspect.holding([suspect.shard(part) for part in inputs]))
        elif len(here) == 1:
            (n,) = here
            old, new = (first, second) if f".{first}." in inputs[n].logical else (second, first)
            zeros = inputs[n].zeros_for
            inputs[n] = replace(
                inputs[n],
                logical=inputs[n].logical.replace(old, new),
                zeros_for=zeros.replace(old, new) if zeros else None,
            )
            mistake = f"{names}: it holds {inputs[n].logical.replace('{layer}', str(suspect.layer))}"
            yield from _guess(mistake, suspect.holding([suspect.shard(part) for part in inputs]))


def permuted_rotary(suspect: Suspect) -> Iterator[Guess]:
    """Rows of each head in the interleaved order of GPT-J where halves are meant, or the other way round."""
    config = suspect.inverse.config
    if config.position_embedding != "rope":
        return
    half = int(config.head_size * config.rotary_percent) // 2
    rest = range(2 * half, config.head_size)
    orders = {
        "interleaved": [row for pair in range(half) for row in (pair, pair + half)],
        "de-interleaved": [*range(0, 2 * half, 2), *range(1, 2 * half, 2)],
    }
    for parts in (("query", "key"), ("query",), ("key",)):
        wanted = [any(f"attention.{part}." in each.logical for part in parts) for each in suspect.rule.inputs]
        if not any(wanted):
            continue
        for word, order in orders.items():
            shards = [suspect.shard(part) for part in suspect.rule.inputs]
            moved = [
                _heads_permuted(view, [*order, *rest]) if move else view
                for view, move in zip(shards, wanted, strict=True)
            ]
            yield from _guess(
                f"the rotary halves of {' and '.join(parts)} are {word} within each head", suspect.holding(moved)
            )


def _heads_permuted(view: View, order: Sequence[int]) -> View:
    size = len(order)
    rows = [(start + row, 1) for start in range(0, view.shape[0], size) for row in order]
    return view.gather(0, rows)


def wrong_key_value_heads(suspect: Suspect) -> Iterator[Guess]:
    """The right query heads with the key/value heads of another rank: repeated in the wrong order."""
    is_kv = [".attention.key." in part.logical or ".attention.value." in part.logical for part in suspect.rule.inputs]
    if not any(is_kv):
        return
    for other in range(suspect.tp.size):
        shards = [
            suspect.shard(part, tp_rank=other if moved else None)
            for part, moved in zip(suspect.rule.inputs, is_kv, strict=True)
        ]
        mistake = f"its key/value heads are in the wrong order: they are those of tp rank {other}"
        yield from _guess(mistake, suspect.holding(shards))


def other_rank(suspect: Suspect) -> Iterator[Guess]:
    """The shard of another tp rank."""
    for other in range(suspect.tp.size):
        shards = [suspect.shard(part, tp_rank=other) for part in suspect.rule.inputs]
        yield from _guess(f"it holds the shard of tp rank {other}", suspect.holding(shards))


def other_layer(suspect: Suspect) -> Iterator[Guess]:
    """The tensor of another layer; the nearest first."""
    if suspect.layer < 0:
        return
    for layer in sorted(range(suspect.inverse.config.num_layers), key=lambda n: abs(n - suspect.layer)):
        shards = [suspect.shard(part, layer=layer) for part in suspect.rule.inputs]
        yield from _guess(f"it holds the tensor of layer {layer}", suspect.holding(shards))


def other_tensor(suspect: Suspect) -> Iterator[Guess]:
    """What belongs into another tensor of the same layer, or of the ends."""
    for rule in suspect.inverse.output.plan.planner.rules:
        in_layer = rule.scope is Scope.LAYER
        if rule is suspect.rule or in_layer != (suspect.layer >= 0) or not rule.when(suspect.inverse.config):
            continue
        names = " and ".join(part.logical.replace("{layer}", str(suspect.layer)) for part in rule.inputs)
        planned = suspect.holding([suspect.shard(part) for part in rule.inputs])
        yield from _guess(f"it holds {names}", planned and replace(planned, values=_values(suspect, rule.values, rule)))


def _values(suspect: Suspect, values: ValueOps, rule: TargetRule) -> tuple[ValueOp, ...]:
    tensor = suspect.inverse.logical.find(rule.inputs[0].logical, layer=suspect.layer)
    return (*(tensor.values if tensor else ()), *values(suspect.inverse.config))


HYPOTHESES: tuple[Hypothesis, ...] = (
    one_flipped_bit,
    never_written,
    leaked_padding,
    wrong_norm_offset,
    not_transposed,
    swapped_parts,
    permuted_rotary,
    wrong_key_value_heads,
    other_rank,
    other_layer,
    other_tensor,
)
"""In the order they are tried: the particular before the general."""


def explain(suspect: Suspect, sources: SourceFiles, reader: OutputReader) -> str:
    """The first mistake that accounts for the whole tensor, or an empty string when none does."""
    for hypothesis in HYPOTHESES:
        try:
            for guess in hypothesis(suspect):
                if guess.planned is None or _matches(suspect, guess.planned, sources, reader):
                    return guess.mistake
        except ExportError:
            continue  # the model has no such part, or it cannot be divided so: not this mistake
    return ""


def _matches(suspect: Suspect, planned: PlannedTensor, sources: SourceFiles, reader: OutputReader) -> bool:
    """Whether the file holds exactly what `planned` describes."""
    output = replace(suspect.output, planned=planned)
    uses: dict[Slab, list[Use]] = defaultdict(list)
    for piece in planned.view.pieces:
        if piece.slab is None:
            if not _is_zero(output, piece, reader):
                return False
        elif piece.box.num_elements:
            uses[piece.slab].append(_use(output, piece, piece.slab, suspect))
    work = [
        SlabUses(slab, slab_shape(slab, suspect.inverse.catalog.tensors), planned.source_dtype, tuple(each))
        for slab, each in uses.items()
    ]
    every = [use for each in uses.values() for use in each]
    return Comparer(sources, reader, converter=choose_converter(every)).equal(work)


def _use(output: OutputTensor, piece: Piece, slab: Slab, suspect: Suspect) -> Use:
    shape = slab_shape(slab, suspect.inverse.catalog.tensors)
    size = piece.box.size[len(piece.box.size) - len(shape) :]
    row, _, column, _ = flat_rectangle(piece.box, output.planned.view.shape)
    return Use(flat_rectangle(Box(piece.source_start, size), shape), output, row, column)


def _is_zero(output: OutputTensor, piece: Piece, reader: OutputReader) -> bool:
    top, bottom, left, right = flat_rectangle(piece.box, output.planned.view.shape)
    rows = (Region((row, row + 1), (left, right)) for row in range(top, bottom))
    return not any(reader.read(output, row).any() for row in rows)
