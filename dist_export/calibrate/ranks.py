"""The ranks of a calibration beside torch's process group: how they find one another, and fail together."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator

from dist_export.runtime.failure import PeerFailedError
from dist_export.runtime.group import Group
from dist_export.runtime.monitor import Timing

_LOST_PEER = ("by peer", "Broken pipe", "NCCL")
"""What torch's errors say when the other end of a connection is gone."""


def union(group: Group, keys: set[str], *, step: str) -> set[str]:
    """The keys of all ranks; all of them call it."""
    gathered = group.gather(f"{step} of each rank", json.dumps(sorted(keys)).encode())
    told = None
    if gathered is not None:
        told = json.dumps(sorted({key for each in gathered for key in json.loads(each)})).encode()
    return set(json.loads(group.broadcast(step, told)))


@contextlib.contextmanager
def failing_together(group: Group) -> Iterator[None]:
    """Makes an error within it the run's before anything is torn down, which the other ranks would report instead.

    An error of torch's because another rank is gone becomes that rank's failure, once the group knows of it.
    """
    try:
        yield
    except PeerFailedError:
        raise
    except Exception as error:
        if group.world_size > 1 and _is_lost_peer(error):
            _wait_for_verdict(group)
        group.fail(error)
        raise


def _is_lost_peer(error: Exception) -> bool:
    named = type(error).__name__ in ("DistBackendError", "DistNetworkError")
    return named or (type(error) is RuntimeError and any(text in str(error) for text in _LOST_PEER))


def _wait_for_verdict(group: Group) -> None:
    """Raise PeerFailedError when the group has found out which rank it was; return when it does not."""
    deadline = time.monotonic() + 2 * Timing().lost_after_s
    while time.monotonic() < deadline:
        group.check()
        time.sleep(0.1)
