"""World detection: tables of the variables that launchers set."""

from __future__ import annotations

import pytest

from dist_export.errors import ExportError
from dist_export.runtime.torch_store import first_host, store_address
from dist_export.runtime.world import SINGLE, World, detect_world, parse_tasks_per_node


def torchrun(rank: int, size: int, local_rank: int, local_size: int, group: int) -> dict[str, str]:
    values = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": local_rank, "LOCAL_WORLD_SIZE": local_size}
    return {name: str(value) for name, value in (values | {"GROUP_RANK": group}).items()}


def srun(rank: int, size: int, local_rank: int, node: int, tasks: str) -> dict[str, str]:
    values = {
        "SLURM_PROCID": rank, "SLURM_NTASKS": size, "SLURM_LOCALID": local_rank, "SLURM_NODEID": node,
        "SLURM_STEP_ID": 0, "SLURM_STEP_TASKS_PER_NODE": tasks, "SLURM_JOB_ID": 77,
    }  # fmt: skip
    return {name: str(value) for name, value in values.items()}


def open_mpi(rank: int, size: int, local_rank: int, local_size: int) -> dict[str, str]:
    values = {"RANK": rank, "SIZE": size, "LOCAL_RANK": local_rank, "LOCAL_SIZE": local_size, "NODE_RANK": local_rank}
    return {f"OMPI_COMM_WORLD_{name}": str(value) for name, value in values.items()}


def mpich(rank: int, size: int, local_rank: int, local_size: int) -> dict[str, str]:
    values = {"PMI_RANK": rank, "PMI_SIZE": size, "MPI_LOCALRANKID": local_rank, "MPI_LOCALNRANKS": local_size}
    return {name: str(value) for name, value in values.items()}


#: What a batch script sees: its own task 0 of the job, in no step of srun.
BATCH = {
    "SLURM_JOB_ID": "77", "SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0",
    "SLURM_TASKS_PER_NODE": "4(x2)",
}  # fmt: skip


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, SINGLE),
        ({"PATH": "/bin", "LOCAL_RANK": "3"}, SINGLE),
        (torchrun(5, 8, 1, 4, 1), World(5, 8, 1, 4, 1, "torchrun")),
        (torchrun(0, 1, 0, 1, 0), World(0, 1, 0, 1, 0, "torchrun")),
        (srun(9, 10, 1, 2, "4(x2),2"), World(9, 10, 1, 2, 2, "slurm")),
        (srun(5, 10, 1, 1, "4(x2),2"), World(5, 10, 1, 4, 1, "slurm")),
        (srun(4, 6, 1, 1, "2(x3)"), World(4, 6, 1, 2, 1, "slurm")),  # cyclic: ranks 1 and 4 on node 1
        (srun(0, 1, 0, 0, "1"), World(0, 1, 0, 1, 0, "slurm")),
        (open_mpi(3, 4, 3, 4), World(3, 4, 3, 4, 0, "openmpi")),
        (open_mpi(3, 4, 1, 2), World(3, 4, 1, 2, -1, "openmpi")),
        (mpich(2, 4, 2, 4), World(2, 4, 2, 4, 0, "mpich")),
        (mpich(2, 4, 0, 2), World(2, 4, 0, 2, -1, "mpich")),
        # In a batch script nothing was started by srun yet; the step ids are Slurm's marks for such steps.
        (BATCH, SINGLE),
        (BATCH | {"SLURM_STEP_ID": "4294967291"}, SINGLE),
        (BATCH | {"SLURM_STEP_ID": "4294967290"}, SINGLE),
        (BATCH | {"SLURM_STEP_ID": "batch"}, SINGLE),
        # torchrun inside a Slurm step; mpirun inside a batch job starts its daemons with srun.
        (srun(1, 2, 0, 1, "1(x2)") | torchrun(5, 8, 1, 4, 1), World(5, 8, 1, 4, 1, "torchrun")),
        (srun(1, 2, 0, 1, "1(x2)") | open_mpi(5, 8, 1, 4), World(5, 8, 1, 4, -1, "openmpi")),
        (srun(1, 2, 0, 1, "1(x2)") | mpich(5, 8, 1, 4), World(5, 8, 1, 4, -1, "mpich")),
        (BATCH | open_mpi(5, 8, 1, 4), World(5, 8, 1, 4, -1, "openmpi")),
        # srun --mpi=pmi2 sets two of MPICH's variables; RANK=$SLURM_PROCID is a habit.
        (srun(1, 2, 0, 1, "1(x2)") | {"PMI_RANK": "1", "PMI_SIZE": "2"}, World(1, 2, 0, 1, 1, "slurm")),
        (srun(1, 2, 0, 1, "1(x2)") | {"RANK": "1", "WORLD_SIZE": "2"}, World(1, 2, 0, 1, 1, "slurm")),
        (srun(5, 6, 1, 1, "4,2") | {"SLURM_STEP_NUM_TASKS": "6", "SLURM_NTASKS": "99"}, World(5, 6, 1, 2, 1, "slurm")),
        ({"RANK": "0", "WORLD_SIZE": "1"}, SINGLE),
    ],
)
def test_world_of(environ: dict[str, str], expected: World) -> None:
    assert detect_world(environ) == expected


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        (torchrun(8, 8, 0, 4, 1), "RANK=8 is not below WORLD_SIZE=8"),
        (torchrun(3, 8, 4, 4, 0), "LOCAL_RANK=4 is not below LOCAL_WORLD_SIZE=4"),
        (torchrun(1, 2, 1, 4, 0), "LOCAL_WORLD_SIZE=4 exceeds WORLD_SIZE=2"),
        (torchrun(1, 2, 1, 2, 2), "GROUP_RANK=2 is not below WORLD_SIZE=2"),
        (torchrun(1, 2, 1, 2, 0) | {"RANK": "-1"}, "RANK='-1' is not a non-negative whole number"),
        (torchrun(1, 2, 1, 2, 0) | {"WORLD_SIZE": "two"}, "WORLD_SIZE='two' is not"),
        ({"RANK": "0"}, "WORLD_SIZE is not set although"),
        ({"WORLD_SIZE": "4"}, "RANK is not set although"),
        ({"RANK": "1", "WORLD_SIZE": "4"}, "RANK=1 and WORLD_SIZE=4 are set, but not LOCAL_RANK"),
        ({"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "0"}, "LOCAL_WORLD_SIZE is not set"),
        (srun(0, 10, 0, 0, "4(x2)"), r"SLURM_STEP_TASKS_PER_NODE=4\(x2\) makes 8 tasks, but SLURM_NTASKS=10"),
        (srun(0, 8, 0, 2, "4(x2)"), r"SLURM_NODEID=2, but SLURM_STEP_TASKS_PER_NODE=4\(x2\) has 2 nodes"),
        (srun(0, 8, 4, 1, "4(x2)"), "SLURM_LOCALID=4 is not below the tasks on this node=4"),
        (srun(8, 8, 0, 1, "4(x2)"), "SLURM_PROCID=8 is not below SLURM_NTASKS=8"),
        (srun(0, 8, 0, 0, "4x2"), "SLURM_STEP_TASKS_PER_NODE='4x2' is not of the form"),
        (open_mpi(4, 4, 0, 2), "OMPI_COMM_WORLD_RANK=4 is not below OMPI_COMM_WORLD_SIZE=4"),
        ({"OMPI_COMM_WORLD_RANK": "0"}, "OMPI_COMM_WORLD_SIZE is not set"),
        ({"PMI_RANK": "0", "PMI_SIZE": "2"}, "MPI_LOCALRANKID is not set"),
    ],
)
def test_contradictions_are_errors_that_name_the_variables(environ: dict[str, str], message: str) -> None:
    with pytest.raises(ExportError, match=message):
        detect_world(environ)


def test_all_contradictions_are_named_at_once() -> None:
    with pytest.raises(ExportError, match=r"(?s)2 faults.*RANK=9.*LOCAL_RANK=5"):
        detect_world(torchrun(9, 8, 5, 4, 0))


def test_every_rank_of_a_cyclic_job_has_its_own_place() -> None:
    # `srun --distribution=cyclic` over nodes of 3, 2 and 1 tasks.
    places = [(0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (0, 2)]
    worlds = [detect_world(srun(rank, 6, local, node, "3,2,1")) for rank, (node, local) in enumerate(places)]
    assert [world.local_world_size for world in worlds] == [3, 2, 1, 3, 2, 3]
    assert [(world.node_rank, world.local_rank) for world in worlds] == places


def test_tasks_per_node_of_a_huge_machine_takes_no_memory() -> None:
    assert parse_tasks_per_node("4(x100000000),2") == [(4, 100_000_000), (2, 1)]


@pytest.mark.parametrize(
    ("nodelist", "expected"),
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("gpu[003-007,9],login", "gpu003"),
        ("gpu[5,7-9]", "gpu5"),
        ("rack[1-2]node[04-08]", "rack1node04"),
        ("a[1-2]-ib,b", "a1-ib"),
    ],
)
def test_first_host_of_a_node_list(nodelist: str, expected: str) -> None:
    assert first_host(nodelist) == expected


def test_store_address_comes_from_the_environment_or_from_slurm() -> None:
    world = World(5, 8, 1, 4, 1, "slurm")
    job = {"SLURM_JOB_ID": "77", "SLURM_STEP_ID": "0", "SLURM_JOB_NODELIST": "gpu[003-004]"}
    host, port = store_address(world, job)
    assert host == "gpu003"
    assert 12000 <= port < 32000
    assert store_address(world, job | {"MASTER_ADDR": "h", "MASTER_PORT": "29500"}) == ("h", 29500)
    assert store_address(world, job | {"SLURM_STEP_ID": "1"})[1] != port
    one_node = World(1, 4, 1, 4, 0, "openmpi")
    assert store_address(one_node, {"PMIX_NAMESPACE": "prterun-9@1"})[0] == "127.0.0.1"


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({}, "set MASTER_ADDR and MASTER_PORT: the openmpi launcher"),
        ({"MASTER_ADDR": "h"}, "set MASTER_PORT"),
        ({"MASTER_ADDR": "h", "MASTER_PORT": "70000"}, "MASTER_PORT='70000' is not a port number"),
    ],
)
def test_a_store_address_that_follows_from_nothing_is_an_error(environ: dict[str, str], message: str) -> None:
    with pytest.raises(ExportError, match=message):
        store_address(World(3, 4, 1, 2, -1, "openmpi"), environ)
