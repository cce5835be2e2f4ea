"""Which process am I: the rank, as torchrun, Slurm, Open MPI or MPICH tells it through the environment.

Nothing here communicates. Sources of the variables: torch/distributed/elastic (torchrun), the srun manual page
(OUTPUT ENVIRONMENT VARIABLES), Open MPI's mpirun manual page, MPICH's Hydra process manager (Intel MPI uses it too).
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping
from pathlib import Path

from msgspec import Struct

from dist_export.errors import ExportError, Faults

#: Slurm reserves step ids from here on for steps that are no srun: 0xfffffffb batch, 0xfffffffc extern,
#: 0xfffffffa interactive (slurm.h).
_FIRST_SPECIAL_STEP = 0xFFFFFFF0

_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
_OPEN_MPI = tuple(f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE"))
_MPICH = ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")


class World(Struct, frozen=True):
    """Where this process stands among the processes of the run.

    `node_rank` is the number of this process's node, or -1 where the launcher does not tell it (MPI over several
    nodes). `launcher` is one of ``torchrun``, ``slurm``, ``openmpi``, ``mpich``, ``local`` (forked by us), ``single``.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    node_rank: int
    launcher: str


SINGLE = World(rank=0, world_size=1, local_rank=0, local_world_size=1, node_rank=0, launcher="single")


def node_name() -> str:
    """What tells this machine from others of the run: its host name and, where names repeat, its boot's number."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        boot = ""
    return f"{socket.gethostname()}/{boot}"


def process_name(pid: int) -> str:
    """What tells a living process from all others of the run: machine, process namespace, start time and, last, its
    number; ``""`` where the system does not tell or the process has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        namespace = os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else f"{node_name()}/{namespace}/{fields[19]}/{pid}"


def detect_world(environ: Mapping[str, str]) -> World:
    """Read the world from `environ`; every process calls it for itself.

    torchrun is asked first, because it often runs inside a Slurm step or under mpirun. MPI comes before Slurm, because
    mpirun inside an allocation starts its daemons with srun, whose variables its processes then inherit.

    Raises:
        ExportError: the variables of one launcher are incomplete or contradict one another; it names them.
    """
    if "RANK" in environ or "WORLD_SIZE" in environ:
        return _torchrun(environ)
    return _mpi_or_slurm(environ)


def _mpi_or_slurm(environ: Mapping[str, str]) -> World:
    if _OPEN_MPI[0] in environ or _OPEN_MPI[1] in environ:
        return _from_names(environ, _OPEN_MPI, "openmpi")
    slurm = _is_srun_step(environ)
    # `srun --mpi=pmi2` sets PMI_RANK and PMI_SIZE too, but not Hydra's MPI_LOCALRANKID.
    if _MPICH[0] in environ and ("MPI_LOCALRANKID" in environ or not slurm):
        return _from_names(environ, _MPICH, "mpich")
    return _slurm(environ) if slurm else SINGLE


def _torchrun(environ: Mapping[str, str]) -> World:
    if "LOCAL_RANK" not in environ:
        return _hand_made(environ)
    world = _from_names(environ, _TORCHRUN, "torchrun")
    if "GROUP_RANK" not in environ:
        return world
    return _checked(
        World(
            rank=world.rank,
            world_size=world.world_size,
            local_rank=world.local_rank,
            local_world_size=world.local_world_size,
            node_rank=_integer(environ, "GROUP_RANK"),
            launcher="torchrun",
        ),
        (*_TORCHRUN, "GROUP_RANK"),
    )


def _hand_made(environ: Mapping[str, str]) -> World:
    """RANK and WORLD_SIZE without LOCAL_RANK: set by hand (as in `RANK=$SLURM_PROCID`), or by an operator per pod."""
    rank, world_size = _integer(environ, "RANK"), _integer(environ, "WORLD_SIZE")
    below = _mpi_or_slurm(environ)
    if (below.rank, below.world_size) == (rank, world_size):
        return below
    raise ExportError(
        f"RANK={rank} and WORLD_SIZE={world_size} are set, but not LOCAL_RANK and LOCAL_WORLD_SIZE, and no other "
        "launcher's variables agree with them: start with torchrun, or set all four, or unset them"
    )


def _from_names(environ: Mapping[str, str], names: tuple[str, ...], launcher: str) -> World:
    rank, world_size, local_rank, local_world_size = (_integer(environ, name) for name in names)
    one_node = local_world_size == world_size
    return _checked(World(rank, world_size, local_rank, local_world_size, 0 if one_node else -1, launcher), names)


def _is_srun_step(environ: Mapping[str, str]) -> bool:
    """Whether srun started this process: a batch script has SLURM_PROCID and SLURM_NTASKS too, but no own step."""
    step = environ.get("SLURM_STEP_ID", environ.get("SLURM_STEPID", ""))
    return "SLURM_PROCID" in environ and step.isdecimal() and int(step) < _FIRST_SPECIAL_STEP


def _slurm(environ: Mapping[str, str]) -> World:
    size_name = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environ else "SLURM_NTASKS"
    world_size, node_rank = _integer(environ, size_name), _integer(environ, "SLURM_NODEID")
    local_world_size = _tasks_on_node(environ, node_rank, size_name, world_size)
    return _checked(
        World(
            rank=_integer(environ, "SLURM_PROCID"),
            world_size=world_size,
            local_rank=_integer(environ, "SLURM_LOCALID"),
            local_world_size=local_world_size,
            node_rank=node_rank,
            launcher="slurm",
        ),
        ("SLURM_PROCID", size_name, "SLURM_LOCALID", "SLURM_NODEID"),
    )


def _tasks_on_node(environ: Mapping[str, str], node_rank: int, size_name: str, world_size: int) -> int:
    step_name, job_name = "SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE"
    name = step_name if step_name in environ else job_name
    if name not in environ:
        raise ExportError(f"{step_name} is not set although srun started this process (SLURM_STEP_ID is set)")
    groups = parse_tasks_per_node(environ[name], name)
    total = sum(tasks * nodes for tasks, nodes in groups)
    if total != world_size:
        raise ExportError(f"{name}={environ[name]} makes {total} tasks, but {size_name}={world_size}")
    first = 0
    for tasks, nodes in groups:
        if 0 <= node_rank < first + nodes:
            return tasks
        first += nodes
    raise ExportError(f"SLURM_NODEID={node_rank}, but {name}={environ[name]} has {first} nodes")


def parse_tasks_per_node(text: str, name: str = "SLURM_TASKS_PER_NODE") -> list[tuple[int, int]]:
    """``"4(x2),2"`` → ``[(4, 2), (2, 1)]``: (tasks per node, number of such nodes), in node order.

    Raises:
        ExportError: `text` has another form; the message names the variable `name`.
    """
    groups = []
    for part in text.split(","):
        match = re.fullmatch(r"([0-9]{1,9})(?:\(x([0-9]{1,9})\))?", part.strip())
        if match is None:
            raise ExportError(f"{name}={text!r} is not of the form '4(x2),2'")
        groups.append((int(match[1]), int(match[2] or 1)))
    return groups


def _integer(environ: Mapping[str, str], name: str) -> int:
    value = environ.get(name)
    if value is None:
        raise ExportError(f"{name} is not set although other variables of the same launcher are")
    if re.fullmatch(r"[0-9]{1,9}", value.strip()) is None:
        raise ExportError(f"{name}={value!r} is not a non-negative whole number")
    return int(value)


def _checked(world: World, names: tuple[str, ...]) -> World:
    rank_name, size_name, local_rank_name = names[:3]
    local_size_name = names[3] if world.launcher != "slurm" else "the tasks on this node"
    faults = Faults(f"the {world.launcher} variables contradict one another")
    if world.rank >= world.world_size:
        faults.add(f"{rank_name}={world.rank} is not below {size_name}={world.world_size}")
    if world.local_rank >= world.local_world_size:
        faults.add(f"{local_rank_name}={world.local_rank} is not below {local_size_name}={world.local_world_size}")
    if world.local_world_size > world.world_size:
        faults.add(f"{local_size_name}={world.local_world_size} exceeds {size_name}={world.world_size}")
    if world.node_rank >= world.world_size:
        faults.add(f"{names[-1]}={world.node_rank} is not below {size_name}={world.world_size}")
    faults.raise_if_any()
    return world
