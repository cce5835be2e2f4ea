"""The parallel layout of a legacy checkpoint: which rank file holds which shard.

Folders are ``mp_rank_TT[_PPP][_EEE]`` (Megatron-LM, ``get_checkpoint_name``): the pp rank only with pp > 1, the ep
rank only with ep > 1, so one suffix alone can be either. Not every (tp, ep) pair has a folder: where experts are
not split over tp, ranks are both a tp rank of the dense tensors and an ep rank of the experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from msgspec import Struct

from dist_export.checkpoint.legacy_files import RankFile, RankState
from dist_export.errors import ExportError, Faults

Rank = tuple[int, int, int]
"""(tp, pp, ep) rank."""


class Layout(Struct, frozen=True):
    """Sizes of the training layout and the number of each rank's file."""

    tp: int
    pp: int
    ep: int
    expert_tp: int
    """tp size of the experts."""
    files: Mapping[Rank, int]

    def dense(self, pp: int) -> list[int]:
        """Files with the dense tensors of a stage, by tp rank. Any ep rank's do: they are replicas."""
        return [min(number for rank, number in self.files.items() if rank[:2] == (tp, pp)) for tp in range(self.tp)]

    def experts(self, pp: int, ep: int) -> list[int]:
        """Files with the experts of an ep rank in a stage, by expert-tp rank: the first replica of each.

        In every rank order of Megatron-Core tp is the fastest axis, of dense tensors and of experts alike
        (parallel_state.py, `RankGenerator`), so the expert-tp rank of a folder is its tp rank modulo `expert_tp`.
        """
        if not self.names_tell_expert_tp:
            raise ExportError(
                f"expert_tensor_parallel_size {self.expert_tp} does not divide tp {self.tp}: ranks with different "
                "expert shards wrote the same files, so some are lost; save again as torch_dist"
            )
        here = {rank[0] % self.expert_tp: number for rank, number in reversed(self._of_stage(pp, ep))}
        return [here[expert_tp] for expert_tp in range(self.expert_tp)]

    @property
    def names_tell_expert_tp(self) -> bool:
        """Whether a folder's tp rank says which expert shard it holds."""
        return self.tp % self.expert_tp == 0

    def _of_stage(self, pp: int, ep: int) -> list[tuple[Rank, int]]:
        return sorted((rank, number) for rank, number in self.files.items() if rank[1:] == (pp, ep))


def argument(arguments: Mapping[str, object] | None, *names: str) -> int | None:
    """The first of some saved arguments that is a positive integer, or None."""
    for name in names:
        value = (arguments or {}).get(name)
        if type(value) is int and value > 0:
            return value
    return None


def layout_of(folder: Path, ranks: Sequence[RankFile], states: Sequence[RankState]) -> Layout:
    """The layout, from the saved arguments where there are any and from the folder names otherwise.

    Raises `ExportError` naming the folders that are missing or too many.
    """
    arguments = states[0].arguments
    numbers = _rank_numbers(folder, ranks, states)
    saved = (
        argument(arguments, "tensor_model_parallel_size", "model_parallel_size"),
        argument(arguments, "pipeline_model_parallel_size"),
        argument(arguments, "expert_model_parallel_size"),
    )
    found = tuple(max(rank[axis] for rank in numbers) + 1 for axis in range(3))
    if arguments is None:
        tp, pp, ep = found
    else:  # an axis that the arguments do not name is older than it
        tp, pp, ep = (size or 1 for size in saved)
    files = {rank: number for number, rank in enumerate(numbers)}
    expert_tp = argument(arguments, "expert_tensor_parallel_size") or _expert_tp(tp, pp, ep, files)
    layout = Layout(tp, pp, ep, expert_tp, files)
    _check(folder, layout, ranks)
    return layout


def _rank_numbers(folder: Path, ranks: Sequence[RankFile], states: Sequence[RankState]) -> list[Rank]:
    lengths = {len(rank.suffixes) for rank in ranks}
    if len(lengths) > 1 or max(lengths) > 2:
        names = ", ".join(sorted({rank.name.partition("/")[0] for rank in ranks})[:4])
        raise ExportError(f"{folder}: folders of different layouts are mixed ({names}, …): are two saves in one place?")
    if max(lengths) == 2:
        return [(rank.tp, rank.suffixes[0], rank.suffixes[1]) for rank in ranks]
    if max(lengths) == 0:
        return [(rank.tp, 0, 0) for rank in ranks]
    if _suffix_is_expert_rank(folder, ranks, states):
        return [(rank.tp, 0, rank.suffixes[0]) for rank in ranks]
    return [(rank.tp, rank.suffixes[0], 0) for rank in ranks]


def _suffix_is_expert_rank(folder: Path, ranks: Sequence[RankFile], states: Sequence[RankState]) -> bool:
    """What a single suffix is: said by the arguments; without them, every ep rank has embeddings, one pp rank has."""
    arguments = states[0].arguments
    if arguments is None:
        return all(any("word_embeddings.weight" in name for name in state.chunks[0]) for state in states)
    pp = argument(arguments, "pipeline_model_parallel_size") or 1
    ep = argument(arguments, "expert_model_parallel_size") or 1
    if (pp > 1) == (ep > 1):
        wanted = "two numbers after the tp rank" if pp > 1 else "none"
        raise ExportError(
            f"{folder}: {ranks[0].name.partition('/')[0]} has one number after the tp rank, but the saved arguments "
            f"(pipeline_model_parallel_size {pp}, expert_model_parallel_size {ep}) mean {wanted}"
        )
    return ep > 1


def _expert_tp(tp: int, pp: int, ep: int, files: Mapping[Rank, int]) -> int:
    """Where it was not saved (it has an argument since 0.10): all of tp, unless folders are sparse."""
    full = all((t, p, e) in files for t in range(tp) for p in range(pp) for e in range(ep))
    return tp if full or ep == 1 else 1


def _check(folder: Path, layout: Layout, ranks: Sequence[RankFile]) -> None:
    faults = Faults(f"{folder}: the rank folders are not those of tp {layout.tp}, pp {layout.pp}, ep {layout.ep}")
    sizes = (layout.tp, layout.pp, layout.ep)
    for rank, number in layout.files.items():
        if any(n >= size for n, size in zip(rank, sizes, strict=True)):
            faults.add(f"{ranks[number].name.partition('/')[0]} is beyond that layout; is it of another save?")
    for pp in range(layout.pp):
        dense = {rank[0] for rank in layout.files if rank[1] == pp}
        for tp in sorted(set(range(layout.tp)) - dense):
            faults.add(_lost_dense(tp, pp, layout))
        for ep in range(layout.ep):
            _check_experts(layout, pp, ep, faults)
    faults.raise_if_any()


def _lost_dense(tp: int, pp: int, layout: Layout) -> str:
    stage = f"_{pp:03d}" if layout.pp > 1 else ""
    message = f"mp_rank_{tp:02d}{stage} is missing: the weights of tp rank {tp}" + (
        f", pp rank {pp} are in no folder" if layout.pp > 1 else " are in no folder"
    )
    if tp >= layout.ep * layout.expert_tp:
        return (
            f"{message}; Megatron-Core 0.10 to 0.17 never wrote them where expert_tensor_parallel_size is below "
            "tensor_model_parallel_size: save again with 0.18, or as torch_dist"
        )
    return f"{message}; copy it from where the checkpoint was saved"


def _check_experts(layout: Layout, pp: int, ep: int, faults: Faults) -> None:
    if layout.ep == 1:
        return
    there = {rank[0] for rank in layout.files if rank[1:] == (pp, ep)}
    if not there:
        faults.add(f"no folder holds the experts of ep rank {ep} of pipeline stage {pp}; copy it again")
    elif layout.names_tell_expert_tp:
        missing = sorted(set(range(layout.expert_tp)) - {tp % layout.expert_tp for tp in there})
        if missing:
            faults.add(
                f"the experts of ep rank {ep}, stage {pp} are split over {layout.expert_tp} ranks, but the folders of "
                f"expert-tp ranks {missing} are missing"
            )
