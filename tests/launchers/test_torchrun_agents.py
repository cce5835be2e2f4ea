"""Two torchrun agents on two loopback addresses, each in a network name of its own where that is permitted: two nodes
for the exporter. The same bytes, and nothing left on either when a rank is killed."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("torch")

from support.exports import REPOSITORY, export
from support.faulty_runs import MOST_SECONDS, bytes_read, staged, weights
from support.launched import LAYOUT, Ended, finish, start

ADDRESSES = ("127.0.0.1", "127.0.0.2")


@pytest.fixture(scope="module")
def addresses() -> tuple[str, ...]:
    """Both; skipped where the second is not this machine's."""
    try:
        with socket.socket() as probe:
            probe.bind((ADDRESSES[1], 0))
    except OSError as error:
        pytest.skip(f"{ADDRESSES[1]} is not an address of this machine: {error.strerror}")
    return ADDRESSES


def own_host_name(number: int) -> list[str]:
    """A prefix that gives a command a host name of its own, or nothing where only root may do that."""
    prefix = ["unshare", "--uts", "sh", "-c", f'hostname node{number} && exec "$@"', "sh"]
    if shutil.which("unshare") and not subprocess.run([*prefix, "true"], capture_output=True).returncode:
        return prefix
    return []


def disk_of(disks: Path, number: int) -> Path:
    """A node's own disk; the same for both where they cannot have names of their own, and so are one node."""
    disk = disks / f"disk{number if own_host_name(number) else 1}"
    disk.mkdir(exist_ok=True)
    return disk


def run_agents(
    addresses: tuple[str, ...], program: str, *arguments: object, output: Path, disks: Path | None = None
) -> list[Ended]:
    """Two ranks under each of two agents, to their end."""
    return finish(start_agents(addresses, program, *arguments, disks=disks), marker=str(output))


def start_agents(
    addresses: tuple[str, ...], program: str, *arguments: object, disks: Path | None = None
) -> list[subprocess.Popen[str]]:
    """Start two ranks under each of two agents, which write in a folder of `disks` each, if it is given."""
    with socket.socket() as free:
        free.bind((addresses[0], 0))
        port = free.getsockname()[1]
    rendezvous = ["--rdzv-backend=c10d", f"--rdzv-endpoint={addresses[0]}:{port}", "--rdzv-id=tests"]
    return [
        start(
            *own_host_name(number), sys.executable, "-m", "torch.distributed.run", "--nnodes=2",
            "--nproc-per-node=2", *rendezvous, f"--local-addr={address}", program, *arguments,
            *(("--local-staging", disk_of(disks, number)) if disks else ()),
        )
        for number, address in enumerate(addresses, 1)
    ]  # fmt: skip


def test_two_agents_write_what_one_machine_writes(
    addresses: tuple[str, ...], long_checkpoint: Path, whole: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    ended = run_agents(addresses, str(REPOSITORY / "launch" / "export.py"), long_checkpoint, output, *LAYOUT,
                       output=output)  # fmt: skip
    assert [each.code for each in ended] == [0, 0], "".join(each.text for each in ended)
    assert sum(each.text.count("exported llama") for each in ended) == 1
    assert weights(output) == weights(whole)


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_a_killed_rank_ends_both_agents(
    rank: int, addresses: tuple[str, ...], long_checkpoint: Path, tmp_path: Path, program: Callable[..., str]
) -> None:
    fault = program(rank=rank, point="transfer", after=5, action="kill", pace=0.05)
    output = tmp_path / "out"
    ended = run_agents(addresses, fault, long_checkpoint, output, *LAYOUT, output=output)
    text = "".join(each.text for each in ended)
    print(f"two agents, kill of rank {rank} to the end of all processes: {ended[0].seconds:.1f} s")
    assert all(each.code != 0 for each in ended), text
    assert 0 < ended[0].seconds < MOST_SECONDS, text
    causes = [cause for each in ended for cause in each.causes]
    assert len(causes) == 1 and f"rank {rank} stopped responding" in causes[0], text
    assert not output.exists()


def test_nodes_write_on_disks_of_their_own_first(
    addresses: tuple[str, ...], long_checkpoint: Path, whole: Path, tmp_path: Path, program: Callable[..., str]
) -> None:
    """Killed while the files are gathered, and resumed; all four ranks share two files."""
    fault = program(rank=3, point="gather", after=3, action="kill", pace=0.03)
    output, arguments = tmp_path / "out", (long_checkpoint, tmp_path / "out", *LAYOUT)
    ended = run_agents(addresses, fault, *arguments, output=output, disks=tmp_path)
    text = "".join(each.text for each in ended)
    print(f"two agents, kill while gathering to the end of all processes: {ended[0].seconds:.1f} s")
    assert all(each.code != 0 for each in ended) and 0 < ended[0].seconds < MOST_SECONDS, text
    assert not output.exists()
    left = list(tmp_path.glob("disk*/.dist_export-*"))
    assert len(left) == (2 if own_host_name(1) else 1)
    launcher = str(REPOSITORY / "launch" / "export.py")
    ended = run_agents(addresses, launcher, *arguments, "--resume", output=output, disks=tmp_path)
    assert [each.code for each in ended] == [0, 0], "".join(each.text for each in ended)
    assert weights(output) == weights(whole)
    print(f"read again: {bytes_read(output) / bytes_read(whole):.0%}")
    assert bytes_read(output) < 0.1 * bytes_read(whole)
    assert list(tmp_path.glob("disk*/*")) == staged(output) == []


def test_one_file_of_two_nodes_is_gathered_from_both_disks(
    addresses: tuple[str, ...], long_checkpoint: Path, tmp_path: Path
) -> None:
    output, arguments = tmp_path / "out", (long_checkpoint, tmp_path / "out", *LAYOUT, "--tp", 1)
    launcher = str(REPOSITORY / "launch" / "export.py")
    ended = run_agents(addresses, launcher, *arguments, output=output, disks=tmp_path)
    assert [each.code for each in ended] == [0, 0], "".join(each.text for each in ended)
    alone = export(long_checkpoint, tmp_path / "alone", *LAYOUT, "--tp", 1, "--num-processes", 1)
    assert weights(output) == weights(alone)
    assert list(tmp_path.glob("disk*/*")) == []
