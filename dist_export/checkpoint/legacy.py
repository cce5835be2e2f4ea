"""Legacy checkpoints: ``mp_rank_TT[_PPP][_EEE]/model_optim_rng.pt``, one ``torch.save`` file per training rank.

Megatron-LM's format until 0.8 and with ``--ckpt-format torch`` since, of Megatron-Core and of classic models. The
shards of the ranks become chunks of the same global tensors that a ``torch_dist`` checkpoint has, one key per layer
(and per expert): tp ranks are joined, layers and experts get their global numbers. Only pickles are read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from msgspec import Struct

from dist_export.checkpoint.ignored import ignored_reason
from dist_export.checkpoint.index import CheckpointIndex, ObjectRecord, without_wrapper_prefix
from dist_export.checkpoint.index_builder import IndexBuilder
from dist_export.checkpoint.legacy_classic import core_names, is_classic, is_mask
from dist_export.checkpoint.legacy_files import (
    RankFile,
    RankState,
    find_rank_files,
    has_rank_folders,
    optimizer_file_sizes,
)
from dist_export.checkpoint.legacy_layout import Layout, argument, layout_of
from dist_export.checkpoint.legacy_mla import down_projection_split, unfused
from dist_export.checkpoint.legacy_names import (
    Split,
    expert_tensors,
    global_name,
    is_expert,
    is_gated,
    local_layer,
    router_of,
    second_linear,
    split_of,
)
from dist_export.checkpoint.legacy_quantizers import ReadShard, joined_quantizer, shard_reader, weight_of
from dist_export.checkpoint.legacy_shards import Blocks, Joined, Shard, halves, joined_along, reordered_qkv
from dist_export.checkpoint.rank_states import read_rank_states, read_saved_keys
from dist_export.errors import ExportError, Faults

FORMAT = "legacy"
_COMMON = ("args", "iteration", "checkpoint_version")
_TIED_HEAD = "copy of the tied embeddings on the last pipeline stage"
_EMBEDDING_COPY = "copy of the embeddings on a later pipeline stage"

Chunk = dict[str, Blocks]
"""A rank's tensors of one virtual pipeline stage under Megatron-Core's names, numbered within the chunk."""


def is_legacy(folder: Path) -> bool:
    """Whether an iteration folder holds rank folders of a legacy checkpoint."""
    return has_rank_folders(folder)


def read_index(folder: Path) -> CheckpointIndex:
    """The chunk table of an iteration folder. Reads the pickle of every rank's file and no storage.

    Raises `ExportError` for missing, surplus, cut or refused files and for shards that do not fit each other.
    """
    ranks = find_rank_files(folder)
    if not ranks:
        raise ExportError(f"{folder}: its mp_rank_ folders hold no weights, only optimizer state")
    states = read_rank_states([folder / rank.name for rank in ranks])
    builder = index_of_ranks(folder, ranks, states)
    for size in optimizer_file_sizes(folder):
        builder.ignore("optimizer state", num_bytes=size)
    return builder.build()


def read_common_state(index: CheckpointIndex) -> Mapping[str, object]:
    """What the first rank saved beside the weights: arguments, iteration and ``checkpoint_version``."""
    return read_saved_keys(index.path(0), _COMMON)


def index_of_ranks(folder: Path, ranks: Sequence[RankFile], states: Sequence[RankState]) -> IndexBuilder:
    """A builder with every tensor of the ranks' states, whose files are numbered as `ranks` are.

    Raises `ExportError` naming everything that does not fit together.
    """
    _check_same_save(folder, states)
    builder = IndexBuilder(folder, FORMAT, chunks_are_records=False)
    for rank in ranks:
        builder.file(rank.name)
    for state in states:
        for reason, (number, num_bytes) in state.unused.counts.items():
            builder.ignore(reason, num_bytes=num_bytes, num_tensors=number)
    paths = [folder / name for name in dict.fromkeys(rank.name for rank in ranks)]
    _Assembly(builder, layout_of(folder, ranks, states), states, shard_reader(paths)).run()
    return builder


def _check_same_save(folder: Path, states: Sequence[RankState]) -> None:
    faults = Faults(f"{folder}: ranks were saved by different runs")
    first = states[0]
    for state in states[1:]:
        if state.iteration != first.iteration:
            faults.add(f"{state.path} is of iteration {state.iteration}, {first.path.parent.name} of {first.iteration}")
        elif len(state.chunks) != len(first.chunks):
            faults.add(
                f"{state.path} has {len(state.chunks)} virtual pipeline stages, {first.path.parent.name} has "
                f"{len(first.chunks)}"
            )
    faults.raise_if_any()


class _Stage(Struct, frozen=True):
    """A virtual stage of a pipeline rank, in the order of layers."""

    virtual: int
    pp: int
    first_layer: int
    num_layers: int

    @property
    def is_first(self) -> bool:
        return (self.virtual, self.pp) == (0, 0)


class _Assembly:
    """Joins the ranks' shards and adds them to the table."""

    def __init__(
        self, builder: IndexBuilder, layout: Layout, states: Sequence[RankState], read: ReadShard
    ) -> None:
        self._builder, self._layout, self._states, self._read = builder, layout, states, read
        self._arguments = states[0].arguments
        self._faults = Faults(f"{builder.folder}: shards of the ranks do not make whole tensors")
        self._chunks = [[self._named(state, chunk) for chunk in state.chunks] for state in states]
        self._whose: dict[str, str] = {}

    def run(self) -> None:
        """Add everything; `ExportError` with all faults."""
        for stage in self._stages():
            dense = self._layout.dense(stage.pp)
            self._add_dense(stage, dense)
            self._add_objects(stage, dense)
            if any(is_expert(name) for name in self._chunks[dense[0]][stage.virtual]):
                self._add_experts(stage)
        self._faults.raise_if_any()

    def _named(self, state: RankState, tensors: Mapping[str, Shard]) -> Chunk:
        """A chunk's tensors under Megatron-Core's names, without those that are no weights."""
        kept = {}
        for name, shard in tensors.items():
            reason = "attention mask" if is_mask(name) else ignored_reason(without_wrapper_prefix(name))
            if reason:
                self._builder.ignore(reason, num_bytes=shard.num_bytes)
            else:
                kept[without_wrapper_prefix(name)] = shard
        if is_classic(kept):
            return self._classic(state, kept)
        arguments, tp, where = self._arguments, self._layout.tp, str(state.path)
        apart = (unfused(name, shard, arguments, tp, where=where) for name, shard in kept.items())
        return {name: (shard,) for parts in apart for name, shard in parts}

    def _classic(self, state: RankState, tensors: Mapping[str, Shard]) -> Chunk:
        heads = argument(self._arguments, "num_attention_heads")
        chunk: Chunk = {}
        for name, core in core_names(tensors).items():
            where = f"{state.path}: {name}"
            if core is None:
                self._faults.add(f"{where} has no place in a classic GPT model; such models cannot be exported")
            elif core in chunk:
                self._faults.add(f"{where} is a second {core}")
            elif "query_key_value" in name:
                of_rank = None if heads is None else heads // self._layout.tp
                chunk[core] = reordered_qkv(tensors[name], state.version, of_rank, where=where)
            else:
                chunk[core] = (tensors[name],)
        return chunk

    def _stages(self) -> list[_Stage]:
        """Virtual stages in the order of their layers, which are counted in the files."""
        stages, first = [], 0
        for virtual in range(len(self._states[0].chunks)):
            for pp in range(self._layout.pp):
                number = self._layout.dense(pp)[0]
                layers = {local_layer(name) for name in self._chunks[number][virtual]} - {None}
                if layers != set(range(len(layers))):
                    listed = sorted(layer for layer in layers if layer is not None)
                    self._faults.add(f"{self._states[number].path}: layers are numbered {listed}, some are missing")
                stages.append(_Stage(virtual, pp, first, len(layers)))
                first += len(layers)
        expected = argument(self._arguments, "num_layers", "encoder_num_layers")
        if expected not in (None, first):
            counts = ", ".join(str(stage.num_layers) for stage in stages)
            self._faults.add(f"the pipeline stages hold {counts} layers, {first} together; num_layers is {expected}")
        return stages

    def _add_dense(self, stage: _Stage, files: Sequence[int]) -> None:
        ranks = [self._chunks[number][stage.virtual] for number in files]
        names = [{name for name in rank if not is_expert(name)} for rank in ranks]
        for number, there in zip(files[1:], names[1:], strict=True):
            self._compare(number, there, files[0], names[0])
        for name in (name for name in ranks[0] if name in set.intersection(*names)):
            shards = [rank[name] for rank in ranks]
            reason = self._copy_reason(name, stage)
            if reason:
                self._builder.ignore(reason, num_bytes=sum(each.num_bytes for blocks in shards for each in blocks))
                continue
            self._add(global_name(name, stage.first_layer), name, shards, ranks[0], self._states[files[0]])

    def _compare(self, number: int, there: set[str], first: int, expected: set[str]) -> None:
        for one, other, names in ((number, first, expected - there), (first, number, there - expected)):
            if names:
                listed = ", ".join(sorted(names)[:3]) + (", …" if len(names) > 3 else "")
                self._faults.add(
                    f"{self._states[one].path}: lacks {listed} ({len(names)}), which "
                    f"{self._states[other].path.parent.name} has; copy both again from one save"
                )

    def _copy_reason(self, name: str, stage: _Stage) -> str | None:
        """Why a tensor is a copy of one that another stage has, or None."""
        if stage.is_first:
            return None
        if name.startswith("embedding."):
            return _EMBEDDING_COPY
        arguments = self._arguments
        tied = arguments is not None and not arguments.get("untie_embeddings_and_output_weights", False)
        return _TIED_HEAD if tied and name == "output_layer.weight" else None

    def _add_experts(self, stage: _Stage) -> None:
        for ep in range(self._layout.ep):
            files = self._layout.experts(stage.pp, ep)
            ranks = [self._experts(number, stage) for number in files]
            for number, rank in zip(files[1:], ranks[1:], strict=True):
                self._compare(number, set(rank), files[0], set(ranks[0]))
            for name, blocks in ranks[0].items():
                if all(name in rank for rank in ranks):
                    first = ep * self._num_local_experts(name, self._chunks[files[0]][stage.virtual], files[0])
                    shards = [blocks, *(rank[name] for rank in ranks[1:])]
                    whole = global_name(name, stage.first_layer, first)
                    self._add(whole, name, shards, ranks[0], self._states[files[0]])

    def _experts(self, number: int, stage: _Stage) -> Chunk:
        """A rank's expert tensors, one per expert."""
        chunk, where = self._chunks[number][stage.virtual], str(self._states[number].path)
        found: Chunk = {}
        for name, (shard, *_) in chunk.items():
            if is_expert(name):
                count = self._num_local_experts(name, chunk, number)
                for expert_name, part in expert_tensors(name, shard, count, where=where):
                    found[expert_name] = (part,)
        return found

    def _num_local_experts(self, name: str, chunk: Chunk, number: int) -> int:
        """Experts per ep rank, from the router's rows."""
        router = chunk.get(router_of(name))
        rows = router[0].shape[:1] if router else ()
        total = rows[0] if rows else argument(self._arguments, "num_experts")
        if not total or total % self._layout.ep:
            raise ExportError(
                f"{self._states[number].path}: {name}: {total or 'an unknown number of'} experts cannot be shared by "
                f"ep {self._layout.ep}"
            )
        return total // self._layout.ep

    def _add(self, name: str, local: str, ranks: list[Blocks], beside: Chunk, state: RankState) -> None:
        """Add the tensor whose shard on each tp rank is in `ranks`; `beside` are the other tensors of the first."""
        where = f"{state.path}: {local}"
        if name in self._whose:
            self._faults.add(f"{where} is tensor {name}, which is also in {self._whose[name]}")
            return
        self._whose[name] = str(state.path)
        try:
            joined = self._joined(local, ranks, beside, where)
        except ExportError as error:
            self._faults.add(str(error))
            return
        self._builder.add_boxes(
            name,
            joined.shape,
            joined.dtype,
            starts=[box.start for box in joined.boxes],
            sizes=[box.size for box in joined.boxes],
            places=[(shard.file, shard.offset, shard.num_bytes) for shard in joined.shards],
            strides=[None if shard.is_row_major else shard.plain_strides for shard in joined.shards],
        )

    def _joined(self, local: str, ranks: list[Blocks], beside: Chunk, where: str) -> Joined:
        split = split_of(local)
        if split is None:
            split = down_projection_split(local, ranks[0][0], self._arguments, len(ranks), where=where)
        kinds = [[(block.shape, block.dtype) for block in blocks] for blocks in ranks]
        if any(kind != kinds[0] for kind in kinds):
            listed = "; ".join(f"{dtype} {list(shape)}" for (shape, dtype), *_ in kinds)
            raise ExportError(f"{where}: tp ranks have different shards: {listed}")
        if weight_of(local) is not None:
            return joined_quantizer(local, [rank[0] for rank in ranks], beside, self._read, where=where)
        (shape, _), *_ = kinds[0]
        if split is not None and len(shape) < split.num_dims:
            raise ExportError(f"{where}: has shape {list(shape)}, expected {split.num_dims} dims or more")
        if split is None and len(ranks) > 1:
            raise ExportError(f"{where}: how tp ranks share this tensor is not known, so its shards cannot be joined")
        blocks = [block for rank in ranks for block in rank]
        if split is Split.REPLICATED or split is None:
            return joined_along(0, ranks[0])
        if split is Split.COLUMNS:
            return joined_along(1, blocks)
        if split is Split.GATE_UP:
            second = beside.get(second_linear(local))
            if is_gated(blocks[0], second[0] if second else None, where=where):
                return joined_along(0, halves(blocks))
        return joined_along(0, blocks)

    def _add_objects(self, stage: _Stage, files: Sequence[int]) -> None:
        """State of TransformerEngine's layers: per rank, so its names end in that of the rank's folder."""
        for number in files:
            state = self._states[number]
            for name, shard in state.objects[stage.virtual].items():
                whole = f"{global_name(without_wrapper_prefix(name), stage.first_layer)}/{state.path.parent.name}"
                if shard.is_row_major and shard.num_bytes:
                    self._builder.objects[whole] = ObjectRecord(shard.file, shard.offset, shard.num_bytes)
                else:
                    self._builder.ignore("state of layers that is no weight", num_bytes=shard.num_bytes)
