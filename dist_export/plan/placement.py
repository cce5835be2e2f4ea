"""Placement: which process does which work. A value of its own, apart from the plan.

Identity is the rule where processes and target ranks agree in number: process R makes target shard R.
With fewer processes each makes several shards; with more, several processes share a shard's rows.
Rows that several files need a part of are shared by the processes of a node, so that a row is read once
and not once per file.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from msgspec import Struct

from dist_export.errors import ExportError
from dist_export.plan.work import Fill, SlabUses, Use, WorkItem

SHARE_MIN_BYTES = 1 << 16  # below this a row cut for several targets is cheaper to read again than to share


class Placement(Struct, frozen=True):
    """Processes, the nodes they run on, and the target files each of them owns."""

    node_of_process: tuple[int, ...]
    owners_of_file: tuple[tuple[int, ...], ...]
    """Per output file the processes that make it; the first creates and finishes the file."""

    @property
    def num_processes(self) -> int:
        return len(self.node_of_process)

    def files_near(self, process: int) -> list[int]:
        """Output files made on the node of `process`: those whose rows it may share."""
        node = self.node_of_process[process]
        return [
            file
            for file, owners in enumerate(self.owners_of_file)
            if any(self.node_of_process[owner] == node for owner in owners)
        ]

    def owned_by(self, process: int) -> list[int]:
        """Output files that `process` creates and finishes."""
        return [file for file, owners in enumerate(self.owners_of_file) if owners[0] == process]


def make_placement(node_of_process: Sequence[int], costs: Sequence[int]) -> Placement:
    """Divide output files with `costs` (bytes) among processes.

    Equal numbers: identity. Fewer processes: contiguous runs of files, balanced by cost, so that the
    tp ranks of a stage tend to meet in one process. More processes: each file gets an equal share of
    them, extra ones going to the costliest files.
    """
    num_processes, num_files = len(node_of_process), len(costs)
    if not num_processes or not num_files:
        raise ExportError(f"cannot place {num_files} output files on {num_processes} processes")
    if num_processes >= num_files:
        owners = _several_owners(num_processes, costs)
    else:
        owners = tuple((process,) for process in _contiguous(num_processes, costs))
    return Placement(tuple(node_of_process), owners)


def work_of(process: int, placement: Placement, slabs: Iterable[SlabUses]) -> list[WorkItem]:
    """The work items of one process. Those of all processes together do every use of every row once."""
    homes = {owners: _home(placement, owners) for owners in placement.owners_of_file}
    return [item for slab in slabs for item in _slab_work(process, _groups(placement, homes, slab), slab)]


def fills_of(process: int, placement: Placement, fills: Iterable[Fill]) -> list[Fill]:
    """The zeros that one process writes: those of the files it owns."""
    owned = set(placement.owned_by(process))
    return [fill for fill in fills if fill.output.file in owned]


Owners = tuple[int, ...]
Home = int | Owners


def _home(placement: Placement, owners: Owners) -> Home:
    """The node of a file's owners. Owners on several nodes share with nobody, and stand for themselves: each of them
    plans only the files near itself."""
    nodes = {placement.node_of_process[owner] for owner in owners}
    return nodes.pop() if len(nodes) == 1 else owners


def _slab_work(process: int, groups: Iterable[tuple[Owners, list[Use]]], slab: SlabUses) -> Iterator[WorkItem]:
    for processes, uses in groups:
        if process not in processes:
            continue
        if len(processes) == 1:
            yield slab.item(uses)
            continue
        item = slab.item(uses)
        rows = _share(item.rows, processes.index(process), len(processes), step=item.row_step)
        if rows[0] < rows[1]:
            touching = [use for use in uses if use.source[0] < rows[1] and rows[0] < use.source[1]]
            if touching:
                yield slab.item(touching, rows)


def _groups(placement: Placement, homes: Mapping[Owners, Home], slab: SlabUses) -> list[tuple[Owners, list[Use]]]:
    """(processes that share the rows, the uses they serve), every use in exactly one group."""
    by_owners: dict[Owners, list[Use]] = {}
    for use in slab.uses:
        by_owners.setdefault(placement.owners_of_file[use.output.file], []).append(use)
    if len(by_owners) == 1:
        return list(by_owners.items())
    nodes: dict[Home, list[Owners]] = {}
    for owners in by_owners:
        nodes.setdefault(homes[owners], []).append(owners)
    groups: list[tuple[Owners, list[Use]]] = []
    for owners_here in nodes.values():
        uses = [use for owners in owners_here for use in by_owners[owners]]
        if len(owners_here) > 1 and _worth_sharing(slab, uses):
            groups.append((tuple(sorted({p for owners in owners_here for p in owners})), uses))
        else:
            groups += [(owners, by_owners[owners]) for owners in owners_here]
    return groups


def _worth_sharing(slab: SlabUses, uses: Sequence[Use]) -> bool:
    """Whether several owners would read the same rows, and enough of them to matter.

    They do when they take different columns of the same rows, or when the same elements go to several
    files: two targets in one pass, a replicated embedding.
    """
    if sum(use.num_bytes for use in uses) < SHARE_MIN_BYTES:
        return False
    edges = sorted((use.source[0], use.source[1], use.output.file) for use in uses)
    end, last_file = -1, -1
    for top, bottom, file in edges:
        if top < end and file != last_file:
            return True
        if bottom > end:
            end, last_file = bottom, file
    return False


def _share(rows: tuple[int, int], part: int, parts: int, *, step: int) -> tuple[int, int]:
    first, count = rows[0], -(-(rows[1] - rows[0]) // step)
    edges = (first + count * number // parts * step for number in (part, part + 1))
    low, high = (min(edge, rows[1]) for edge in edges)
    return low, high


def _contiguous(num_processes: int, costs: Sequence[int]) -> list[int]:
    """The process of each file: runs of files whose costs are near equal, none of them empty."""
    total, done, process = sum(costs), 0.0, 0
    result: list[int] = []
    for file, cost in enumerate(costs):
        left = len(costs) - file
        ideal = int((done + cost / 2) * num_processes / max(total, 1))
        process = max(process, min(ideal, num_processes - 1))
        process = min(process, result[-1] + 1 if result else 0)
        process = max(process, num_processes - left)
        result.append(process)
        done += cost
    return result


def _several_owners(num_processes: int, costs: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    shares = [1] * len(costs)
    for _ in range(num_processes - len(costs)):
        neediest = max(range(len(costs)), key=lambda file: costs[file] / shares[file])
        shares[neediest] += 1
    owners, first = [], 0
    for share in shares:
        owners.append(tuple(range(first, first + share)))
        first += share
    return tuple(owners)
