"""What is wrong with a tensor that differs: mistakes that are known to happen, tried out one by one.

Each hypothesis says what the tensor would hold had that mistake been made, as a planned tensor of its own; it is
compared with the file, and a wrong guess is dropped at its first differing block.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import combinations

from msgspec import Struct
from msgspec.structs import replace

from dist_export.convert.sources import SourceFiles
from dist_export.errors import ExportError
from dist_export.models.rules import Input, Scope, TargetRule
from dist_export.models.value_ops import ValueOp, ValueOps
from dist_export.plan.shard import PlannedTensor
from dist_export.plan.work import OutputTensor, SlabUses, Use, flat_rectangle, slab_shape
from dist_export.tensors.boxes import Box
from dist_export.tensors.views import Piece, Slab, View, concatenate, stack
from dist_export.verify.compare import Comparer, Difference, choose_converter
from dist_export.verify.inverse import InverseRules, Place
from dist_export.verify.output import OutputReader, Region

MOST_EXPERTS = 8  # differing experts of a stacked tensor that are tried in pairs


class Suspect(Struct, frozen=True):
    """A target tensor that differs, and what should have made it."""

    inverse: InverseRules
    output: OutputTensor
    rule: TargetRule
    place: Place
    rank: int
    """Target rank."""
    differences: tuple[Difference, ...]
    differing_experts: tuple[int, ...] = ()
    """Experts whose part of a stacked tensor differs."""

    @property
    def planned(self) -> PlannedTensor:
        return self.output.planned

    @property
    def tp_size(self) -> int:
        return self.inverse.layout.tp_size

    def tp_rank(self) -> int:
        """The rank on the tp axis."""
        return self.rank % self.tp_size

    def experts_of(self, rank: int) -> Sequence[int]:
        """The experts that a target rank stacks in this tensor; those of the tensor's place otherwise."""
        if self.rule.over_experts:
            return self.inverse.layout.experts(rank, self.inverse.config.num_experts)
        return (self.place.expert,)

    def shard(
        self, part: Input, expert: int, *, layer: int | None = None, tp_rank: int | None = None
    ) -> View:
        """What an input gives to a rank: by default to this one, of this layer."""
        layer = self.place.layer if layer is None else layer
        tensor = self.inverse.logical.find(part.logical, layer=layer, expert=expert)
        view = tensor.view if tensor else View.zeros(self.inverse.logical_shape(part, Place(layer, expert)))
        rank = self.rank if tp_rank is None else self.rank - self.tp_rank() + tp_rank
        layout = self.inverse.layout
        tp = layout.expert_tensor_parallel(rank) if self.rule.over_experts else layout.tensor_parallel(rank)
        return part.shard.take(view, tp, self.inverse.config)

    def made_of(
        self,
        shard: Callable[[Input, int], View] | None = None,
        *,
        inputs: Sequence[Input] | None = None,
        experts: Sequence[int] | None = None,
    ) -> PlannedTensor | None:
        """The tensor had it been made of other inputs, other experts, or other shards of them."""
        shard, inputs = shard or self.shard, self.rule.inputs if inputs is None else inputs
        experts = self.experts_of(self.rank) if experts is None else experts
        joined = [concatenate([shard(part, expert) for part in inputs], 0) for expert in experts]
        return self.holding(stack(joined) if self.rule.over_experts else joined[0])

    def holding(self, view: View) -> PlannedTensor | None:
        """The tensor had it been made of `view`; None when that has another shape or is what it should be."""
        if view.shape != self.planned.view.shape or view == self.planned.view:
            return None
        return replace(self.planned, view=view)


class Guess(Struct, frozen=True):
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
    yield from _guess("it is all zero", suspect.holding(View.zeros(suspect.planned.view.shape)))


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
    padded = suspect.tp_size * rows
    kept = View.of(slab, whole).narrow(0, 0, min(padded, whole[0])).pad(0, padded)
    mistake = "the checkpoint's padding rows of the vocabulary leaked into rows that must be zero"
    yield from _guess(mistake, suspect.holding(kept.narrow(0, suspect.tp_rank() * rows, rows)))


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
            yield from _guess(names, suspect.made_of(inputs=inputs))
        elif len(here) == 1:
            (n,) = here
            old, new = (first, second) if f".{first}." in inputs[n].logical else (second, first)
            zeros = inputs[n].zeros_for
            inputs[n] = replace(
                inputs[n],
                logical=inputs[n].logical.replace(old, new),
                zeros_for=zeros.replace(old, new) if zeros else None,
            )
            mistake = f"{names}: it holds {suspect.place.fill(inputs[n].logical)}"
            yield from _guess(mistake, suspect.made_of(inputs=inputs))


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
        for word, order in orders.items():

            def shard(part: Input, expert: int, parts: Sequence[str] = parts, order: Sequence[int] = order) -> View:
                view = suspect.shard(part, expert)
                moved = any(f"attention.{each}." in part.logical for each in parts)
                return _heads_permuted(view, [*order, *rest]) if moved else view

            mistake = f"the rotary halves of {' and '.join(parts)} are {word} within each head"
            yield from _guess(mistake, suspect.made_of(shard))


def _heads_permuted(view: View, order: Sequence[int]) -> View:
    size = len(order)
    heads = [view.narrow(0, start, size) for start in range(0, view.shape[0], size)]
    return concatenate([head.gather(0, [(row, 1) for row in order]) for head in heads], 0)


def wrong_key_value_heads(suspect: Suspect) -> Iterator[Guess]:
    """The right query heads with the key/value heads of another rank: repeated in the wrong order."""
    for other in range(suspect.tp_size):

        def shard(part: Input, expert: int, other: int = other) -> View:
            moved = ".attention.key." in part.logical or ".attention.value." in part.logical
            return suspect.shard(part, expert, tp_rank=other if moved else None)

        mistake = f"its key/value heads are in the wrong order: they are those of tp rank {other}"
        yield from _guess(mistake, suspect.made_of(shard))


def other_rank(suspect: Suspect) -> Iterator[Guess]:
    """The shard of another tp rank."""
    for other in range(suspect.tp_size):
        experts = suspect.experts_of(suspect.rank - suspect.tp_rank() + other)
        shard = partial(suspect.shard, tp_rank=other)
        yield from _guess(f"it holds the shard of tp rank {other}", suspect.made_of(shard, experts=experts))


def other_expert(suspect: Suspect) -> Iterator[Guess]:
    """Another expert of the layer, or two of the stacked experts in each other's place."""
    if not suspect.rule.over_experts:
        others = range(suspect.inverse.config.num_experts) if suspect.place.expert >= 0 else ()
        for expert in others:
            yield from _guess(f"it holds expert {expert}", suspect.made_of(experts=(expert,)))
        return
    for first, second in combinations(suspect.differing_experts[:MOST_EXPERTS], 2):
        swapped = {first: second, second: first}
        experts = [swapped.get(expert, expert) for expert in suspect.experts_of(suspect.rank)]
        yield from _guess(f"experts {first} and {second} are swapped", suspect.made_of(experts=experts))


def other_layer(suspect: Suspect) -> Iterator[Guess]:
    """The tensor of another layer; the nearest first."""
    layer = suspect.place.layer
    for other in sorted(range(suspect.inverse.config.num_layers), key=lambda n: abs(n - layer)) if layer >= 0 else ():
        shard = partial(suspect.shard, layer=other)
        yield from _guess(f"it holds the tensor of layer {other}", suspect.made_of(shard))


def other_tensor(suspect: Suspect) -> Iterator[Guess]:
    """What belongs into another tensor of the same layer, or of the ends."""
    for rule in suspect.inverse.output.plan.planner.rules:
        in_layer = rule.scope is Scope.LAYER
        if rule is suspect.rule or in_layer != (suspect.place.layer >= 0) or not rule.when(suspect.inverse.config):
            continue
        if rule.over_experts != suspect.rule.over_experts:
            continue
        names = " and ".join(suspect.place.fill(part.logical) for part in rule.inputs)
        planned = suspect.made_of(inputs=rule.inputs)
        yield from _guess(f"it holds {names}", planned and replace(planned, values=_values(suspect, rule.values, rule)))


def _values(suspect: Suspect, values: ValueOps, rule: TargetRule) -> tuple[ValueOp, ...]:
    tensor = suspect.inverse.logical.find(
        rule.inputs[0].logical, layer=suspect.place.layer, expert=suspect.experts_of(suspect.rank)[0]
    )
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
    other_expert,
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
    catalog = suspect.inverse.catalog
    work = [
        SlabUses(slab, slab_shape(slab, catalog.tensors), planned.source_dtype, tuple(each), catalog.updates.get(slab))
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
