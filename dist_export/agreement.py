"""What the processes of an export agree on before the work."""

from __future__ import annotations

from msgspec import Struct

from dist_export.plan.placement import Placement, make_placement


class Agreement(Struct, frozen=True):
    """What rank 0 tells all ranks before the work: who runs where, and what every file must be."""

    hosts: list[str]
    costs: list[int]
    """Bytes of every file."""
    digests: list[str]
    """Plan digest of every file."""
    attempt: str
    """Names this run's journals."""
    resumed: bool
    """Whether the staging folder holds an earlier run's work."""
    local: str = ""
    """Names the nodes' own folders, where they have one."""
    stale: str = ""
    """Names those of an earlier run whose work is not used."""

    def is_first_of_node(self, rank: int) -> bool:
        """Whether a process does what one of its node's has to do."""
        return self.hosts.index(self.hosts[rank]) == rank

    def placement(self) -> Placement:
        """Who makes which file."""
        return make_placement([self.hosts.index(host) for host in self.hosts], self.costs)
