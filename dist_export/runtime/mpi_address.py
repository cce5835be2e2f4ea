"""The ranks of an MPI job agree where rank 0 can be reached, through the means MPI's own start-up uses.

Sources: MPICH's wire protocol of PMI 1 (``PMI_FD``; Hydra, so Intel MPI too) as its simple_pmi client speaks it; for
other process managers mpi4py, if it is installed.
"""

from __future__ import annotations

import importlib
import os
import socket
from collections.abc import Mapping
from typing import Any

from dist_export.errors import ExportError
from dist_export.runtime.world import World

_KEY = "dist_export_store"

#: Seconds to wait for the process manager or for a rank that starts late.
_ANSWER_WITHIN_S = 300.0


def agree_over_mpi(world: World, environ: Mapping[str, str]) -> tuple[str, str] | None:
    """(host, port) as rank 0 chose them, or None where nothing can carry them. Every rank calls it, once.

    Raises:
        ExportError: the process manager does not answer as it should.
    """
    if world.launcher == "mpich" and environ.get("PMI_FD", "").isdecimal():
        with _Pmi(int(environ["PMI_FD"])) as pmi:
            host, port = pmi.share(_free_address(world) if world.rank == 0 else None)
        return host, port
    return _over_mpi4py(world) if world.launcher in ("mpich", "openmpi") else None


def _free_address(world: World) -> tuple[str, str]:
    """This host, and a port that is free now."""
    host = "127.0.0.1" if world.local_world_size == world.world_size else socket.gethostname()
    with socket.socket() as probe:
        probe.bind(("", 0))
        return host, str(probe.getsockname()[1])


class _Pmi:
    """A client of PMI 1: lines of ``cmd=NAME key=value …``, a request and its answer at a time."""

    def __init__(self, descriptor: int) -> None:
        self._socket = socket.socket(fileno=os.dup(descriptor))
        self._socket.settimeout(_ANSWER_WITHIN_S)
        self._lines = self._socket.makefile("r", encoding="ascii")

    def __enter__(self) -> _Pmi:
        self._ask("init pmi_version=1 pmi_subversion=1", "response_to_init")
        return self

    def __exit__(self, *_error: object) -> None:
        try:
            self._ask("finalize", "finalize_ack")  # or Hydra takes the end of this process for an abort
        finally:
            self._lines.close()
            self._socket.close()

    def share(self, address: tuple[str, str] | None) -> tuple[str, str]:
        """What rank 0 gives, on every rank."""
        space = self._ask("get_my_kvsname", "my_kvsname")["kvsname"]
        if address is not None:
            self._ask(f"put kvsname={space} key={_KEY} value={address[0]}/{address[1]}", "put_result")
        self._ask("barrier_in", "barrier_out")
        host, _, port = self._ask(f"get kvsname={space} key={_KEY}", "get_result")["value"].partition("/")
        return host, port

    def _ask(self, request: str, expected: str) -> dict[str, str]:
        try:
            self._socket.sendall(f"cmd={request}\n".encode("ascii"))
            line = self._lines.readline()
        except OSError as error:
            line = str(error)
        answer = dict(field.partition("=")[::2] for field in line.split())
        if answer.get("cmd") != expected or answer.get("rc", "0") != "0":
            raise ExportError(
                f"the MPI process manager answered {line.strip()!r} to {request.split()[0]!r}: "
                "set MASTER_ADDR and MASTER_PORT"
            )
        return answer


def _over_mpi4py(world: World) -> tuple[str, str] | None:
    """MPI itself carries the address; it is started and ended here, so that its own handling of failures is gone."""
    try:
        mpi4py: Any = importlib.import_module("mpi4py")
        mpi4py.rc.initialize = mpi4py.rc.finalize = False
        mpi: Any = importlib.import_module("mpi4py.MPI")
    except (ImportError, RuntimeError):  # not installed, or without an MPI library
        return None
    mpi.Init()
    try:
        if mpi.COMM_WORLD.Get_size() != world.world_size:  # built for another MPI: every process is alone
            return None
        agreed: tuple[str, str] = mpi.COMM_WORLD.bcast(_free_address(world) if world.rank == 0 else None)
        return agreed
    finally:
        mpi.Finalize()
