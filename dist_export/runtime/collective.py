"""The one collective of a run, on the devices where that pays: NCCL when every rank has a GPU of its own.

Ranks without GPUs, or ranks that share one (which NCCL refuses), exchange the same few megabytes through the control
store (`Group.all_reduce_max`). The result is the same bit for bit: a maximum does not depend on the order.
"""

from __future__ import annotations

import datetime
import importlib
import json
import os
import socket
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dist_export.runtime.group import Group
from dist_export.runtime.world import node_name

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

TIMEOUT_S = 120.0


def all_reduce_max(
    array: npt.NDArray[np.float32], group: Group, *, step: str, device: str, backend: str | None = None
) -> npt.NDArray[np.float32]:
    """The element-wise maximum over all ranks' arrays of one shape; NaN in any of them gives NaN. All ranks call it.

    `device` is the torch device of this rank's arithmetic. `backend` is for tests of the path on a CPU (``gloo``).
    Raises PeerFailedError, and what torch.distributed raises when its processes cannot reach each other.
    """
    place = json.dumps([node_name(), device]).encode()
    places = group.gather(f"{step} devices", place)
    told = None
    if places is not None:
        told = (backend or ("nccl" if _all_have_own_gpu(places) and group.world_size > 1 else "")).encode()
    chosen = group.broadcast(f"{step} backend", told).decode()
    if not chosen:
        return group.all_reduce_max(array, step=step)
    return _reduced(array, group, backend=chosen, step=step, device=device)


def _all_have_own_gpu(places: Sequence[bytes]) -> bool:
    return all(b'"cuda' in place for place in places) and len(set(places)) == len(places)


def shared_store(group: Group, *, step: str = "torch store") -> Any:
    """A store of torch's that every rank reaches and rank 0 hosts, on a port that is free. All ranks call it.

    Not torch's own way of meeting: under torchrun that takes its agent's address for everyone's.
    """
    TCPStore: Any = importlib.import_module("torch.distributed").TCPStore  # noqa: N806
    within = datetime.timedelta(seconds=TIMEOUT_S)
    store, told = None, None
    if group.rank == 0:
        alone = group.world.local_world_size == group.world_size
        host = "127.0.0.1" if alone else os.environ.get("MASTER_ADDR") or socket.gethostname()
        store = TCPStore(host, 0, is_master=True, timeout=within, wait_for_workers=False)
        told = json.dumps([host, store.port]).encode()
    host, port = json.loads(group.broadcast(step, told))
    return store or TCPStore(host, port, is_master=False, timeout=within)


def _reduced(
    array: npt.NDArray[np.float32], group: Group, *, backend: str, step: str, device: str
) -> npt.NDArray[np.float32]:
    import numpy as np
    import torch
    import torch.distributed as dist

    timeout = datetime.timedelta(seconds=TIMEOUT_S)
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    store = shared_store(group, step=f"{step} store")
    dist.init_process_group(backend, store=store, rank=group.rank, world_size=group.world_size, timeout=timeout)
    try:
        # NCCL's maximum drops NaN on some releases, so NaN travels as a flag of its own.
        values = torch.from_numpy(np.nan_to_num(array, nan=-np.inf, neginf=-np.inf, posinf=np.inf)).to(device)
        flags = torch.from_numpy(np.isnan(array).astype(np.float32)).to(device)
        both = torch.stack((values, flags))
        dist.all_reduce(both, op=dist.ReduceOp.MAX)
        reduced, seen = both.cpu().numpy()
    finally:
        dist.destroy_process_group()
    result: npt.NDArray[np.float32] = np.where(seen > 0, np.float32(np.nan), reduced + np.float32(0)).astype(np.float32)
    return result
