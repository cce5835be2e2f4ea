"""Runs a rank's work: the error boundary of every process of a run."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Mapping
from typing import Protocol

from dist_export.errors import ExportError
from dist_export.runtime import exit_codes
from dist_export.runtime.failure import Failure, PeerFailedError, TerminatedError
from dist_export.runtime.group import Group
from dist_export.runtime.monitor import Timing
from dist_export.runtime.signals import terminate_cleanly
from dist_export.runtime.store import MemoryStore, Store
from dist_export.runtime.torch_store import connect_torch_store
from dist_export.runtime.world import World

#: A rank's work: returns its exit code. Every rank runs it with its own group.
Main = Callable[[Group], int]


class Report(Protocol):
    """Tells the user why a run failed; called once in a run."""

    def __call__(self, failure: Failure, *, with_rank: bool = True) -> None:
        """`with_rank`: whether to say which rank it was."""


#: Seconds that ranks have to find the store, in case they start far apart.
_CONNECT_WITHIN_S = 300.0


def run_here(
    world: World,
    main: Main,
    *,
    timing: Timing | None = None,
    environ: Mapping[str, str] = os.environ,
    tell: Report | None = None,
) -> int:
    """Run `main` as the rank that a launcher (torchrun, srun, mpirun) made this process; returns the exit code.

    The cause of a failure is printed once, by the rank that failed, or by the rank that noticed where the failing
    one was killed; `tell` does it where it is given. Every rank returns non-zero then
    (`dist_export.runtime.exit_codes`).
    """
    alone = world.world_size == 1
    tell = tell or print_failure

    def report(failure: Failure) -> None:
        tell(failure, with_rank=not alone)

    try:
        with terminate_cleanly():
            store: Store = (
                MemoryStore() if alone else connect_torch_store(world, environ, timeout_s=_CONNECT_WITHIN_S)
            )
            with contextlib.closing(store):
                return run_rank(world, store, main, timing=timing, report=report)
    except (ExportError, TerminatedError) as error:  # before there was a group
        failure = Failure.of(world.rank, error)
        report(failure)
        return failure.exit_code


def run_rank(
    world: World,
    store: Store,
    main: Main,
    *,
    timing: Timing | None = None,
    report: Callable[[Failure], None] | None = None,
) -> int:
    """Run `main` in a group over `store`; returns its exit code, or that of the failure. Raises nothing."""
    group = Group(world, store, timing=timing, report=report)
    try:
        with group:
            return main(group)
    except (Exception, TerminatedError) as error:  # the boundary: the group has posted and reported it
        return _exit_code(error, group.failure, rank=world.rank)


def _exit_code(error: BaseException, failure: Failure | None, *, rank: int) -> int:
    """The code of a rank that `error` ended, in a run that failed by `failure`."""
    of_peer = failure is not None and failure.rank != rank
    if isinstance(error, TerminatedError) and failure is not None and failure.kind in ("terminated", "interrupted"):
        return error.exit_code  # whoever reported it: the signal went to every rank
    if isinstance(error, PeerFailedError) or of_peer:
        return exit_codes.PEER_FAILED
    return Failure.of(rank, error).exit_code


def print_failure(failure: Failure, *, with_rank: bool = True) -> None:
    """Print ``dist-export: error: rank 3: message`` to standard error, over what is left of a progress line."""
    kind = "internal error" if failure.kind == "internal" else "error"
    clear = "\r\x1b[K" if sys.stderr.isatty() else ""
    with contextlib.suppress(OSError):  # nobody reads standard error: the exit code must do
        sys.stderr.write(f"{clear}dist-export: {kind}: {failure.describe(with_rank=with_rank)}\n")
        sys.stderr.flush()
