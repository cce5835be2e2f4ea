"""The store of a run over several machines: torch's TCPStore, found through the launcher. Only this needs torch."""

from __future__ import annotations

import importlib
import os
import queue
import re
import threading
import zlib
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, TypeVar

from dist_export.errors import ExportError
from dist_export.runtime.failure import StoreLostError
from dist_export.runtime.mpi_address import agree_over_mpi
from dist_export.runtime.store import MAX_VALUE
from dist_export.runtime.world import World

T = TypeVar("T")

#: Seconds without an answer after which the store counts as lost. TCPStore itself waits for ever on a silent host.
_ANSWER_WITHIN_S = 10.0

#: Ports we derive lie below every system's ephemeral range and above the registered services' crowd.
_FIRST_PORT, _NUM_PORTS = 12000, 20000


class TorchStore:
    """A `torch.distributed.Store` as our `Store`.

    torch's calls block inside C++, where neither a signal nor a time limit reaches them. One daemon thread makes
    them, and the caller waits for the result with a limit.
    """

    def __init__(self, store: Any, host_rank: int | None) -> None:
        self.host_rank = host_rank
        self._store = store
        self._caller = _Caller("torch store")
        self._lost: StoreLostError | None = None

    def set(self, key: str, value: bytes) -> None:
        """Store `value` under `key`."""
        assert len(value) <= MAX_VALUE, (key, len(value))
        self._call(lambda: self._store.set(key, value))

    def set_once(self, key: str, value: bytes) -> bytes:
        """Store `value` unless the key exists; returns what is stored."""
        return self._call(lambda: bytes(self._store.compare_set(key, "", value.decode("utf-8"))))

    def get(self, key: str) -> bytes | None:
        """The value, or None. torch's own `get` waits for the key, so the key is looked for first."""
        return self._call(lambda: bytes(self._store.get(key)) if self._store.check([key]) else None)

    def add(self, key: str, amount: int) -> int:
        """Add to a counter and return its new value."""
        return self._call(lambda: int(self._store.add(key, amount)))

    def delete(self, key: str) -> None:
        """Forget a key."""
        self._call(lambda: self._store.delete_key(key))

    def close(self) -> None:
        """End the calling thread; the connection goes with the process."""
        self._caller.close()

    def _call(self, operation: Callable[[], T]) -> T:
        if self._lost is not None:  # the thread still waits for the last answer
            raise self._lost
        try:
            return self._caller.call(operation, _ANSWER_WITHIN_S)
        except (RuntimeError, TimeoutError) as error:  # torch's DistNetworkError and DistStoreError are RuntimeErrors
            lost = StoreLostError(self.host_rank, _first_line(error))
            if isinstance(error, TimeoutError):
                self._lost = lost
            raise lost from error


def connect_torch_store(world: World, environ: Mapping[str, str], *, timeout_s: float) -> TorchStore:
    """Connect to the store of the run; every rank calls it. Waits up to `timeout_s` for the host to appear.

    Under torchrun this is torch's own ``env://`` rendezvous (the agent hosts the store, or rank 0 does where
    TORCHELASTIC_USE_AGENT_STORE is not set); elsewhere rank 0 hosts it at `store_address`.

    Raises:
        ExportError: torch is not installed, the address is unknown, taken or not reachable.
    """
    host, port = store_address(world, environ)
    agent_hosts = world.launcher == "torchrun" and environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    caller = _Caller("torch store rendezvous")
    try:
        store = caller.call(lambda: _open(world, host, port, timeout_s=timeout_s), timeout_s + _ANSWER_WITHIN_S)
    except ImportError as error:
        raise ExportError("several processes need torch to find one another: pip install torch") from error
    except (RuntimeError, TimeoutError, ValueError) as error:
        doing = "hosting" if world.rank == 0 and not agent_hosts else "connecting to"
        raise ExportError(
            f"{doing} the store at {host}:{port} failed: {_first_line(error)}; check MASTER_ADDR and MASTER_PORT"
        ) from error
    finally:
        caller.close()
    return TorchStore(_prefixed(store, environ), None if agent_hosts else 0)


def store_address(world: World, environ: Mapping[str, str]) -> tuple[str, int]:
    """(host, port) of the store: MASTER_ADDR and MASTER_PORT, or what Slurm or MPI implies. Every rank calls it.

    Raises:
        ExportError: one of them is missing and follows from nothing, or the port is no port.
    """
    host = environ.get("MASTER_ADDR") or _default_host(world, environ)
    port = environ.get("MASTER_PORT") or _default_port(environ)
    if host is None or port is None:
        agreed = agree_over_mpi(world, environ)
        host, port = (host or agreed[0], port or agreed[1]) if agreed else (host, port)
    if host is None or port is None:
        missing = " and ".join(n for n, v in (("MASTER_ADDR", host), ("MASTER_PORT", port)) if v is None)
        raise ExportError(f"set {missing}: the {world.launcher} launcher does not tell where rank 0 can be reached")
    if not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise ExportError(f"MASTER_PORT={port!r} is not a port number")
    return host, int(port)


def first_host(nodelist: str) -> str:
    """The first host of a Slurm node list: ``"gpu[003-007,9],login"`` → ``"gpu003"``."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodelist.strip())
    if first is None:
        raise ExportError(f"the Slurm node list {nodelist!r} is empty or malformed: set MASTER_ADDR")
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first[0])


def _default_host(world: World, environ: Mapping[str, str]) -> str | None:
    if world.local_world_size == world.world_size:
        return "127.0.0.1"
    nodelist = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST")
    return first_host(nodelist) if nodelist else None


def _default_port(environ: Mapping[str, str]) -> str | None:
    """A port that every rank of a job derives alike and that two jobs on a node hardly share."""
    names = ("SLURM_JOB_ID", "SLURM_STEP_ID", "PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid")
    identity = [environ[name] for name in names if name in environ]
    return str(_FIRST_PORT + zlib.crc32("/".join(identity).encode()) % _NUM_PORTS) if identity else None


def _open(world: World, host: str, port: int, *, timeout_s: float) -> Any:
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # a lost peer is our message, not a C++ stack
    distributed: Any = importlib.import_module("torch.distributed")
    timeout = timedelta(seconds=timeout_s)
    if world.launcher == "torchrun":
        return next(distributed.rendezvous("env://", world.rank, world.world_size, timeout=timeout))[0]
    return distributed.TCPStore(host, port, is_master=world.rank == 0, timeout=timeout, wait_for_workers=False)


def _prefixed(store: Any, environ: Mapping[str, str]) -> Any:
    """torchrun restarts failed workers on the same store; their keys must be new ones."""
    distributed: Any = importlib.import_module("torch.distributed")
    return distributed.PrefixStore(f"dist_export/{environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class _Caller:
    """Runs functions in a daemon thread, so that a wait for one can be limited and interrupted."""

    def __init__(self, name: str) -> None:
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def call(self, function: Callable[[], T], timeout_s: float) -> T:
        """The function's result or exception; TimeoutError where it takes longer."""
        outcome: list[T] = []
        errors: list[Exception] = []
        done = threading.Event()

        def job() -> None:
            try:
                outcome.append(function())
            except Exception as error:  # handed to the caller, whatever it is
                errors.append(error)
            finally:
                done.set()

        self._jobs.put(job)
        if not done.wait(timeout_s):
            raise TimeoutError(f"no answer within {timeout_s:.0f} s")
        if errors:
            raise errors[0]
        return outcome[0]

    def close(self) -> None:
        """End the thread once it is idle."""
        self._jobs.put(None)

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()
