"""The device collective: on a CPU with gloo in NCCL's place, which takes the same path."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import sys
import numpy as np
from dist_export.runtime.collective import all_reduce_max
from dist_export.runtime.launch import run_local

def main(group):
    mine = np.array([group.rank, -group.rank, -np.inf, np.nan if group.rank == 1 else 3, -0.0], np.float32)
    if group.rank == 0:
        mine[2] = 0.5
    through = {backend: all_reduce_max(mine, group, step=backend or "store", device="cpu", backend=backend)
               for backend in (None, "gloo")}
    last = group.world_size - 1
    expected = np.array([last, 0, 0.5, np.nan if last else 3, 0], np.float32)
    for backend, values in through.items():
        assert values.tobytes() == expected.tobytes(), (backend, values)
    return 0

sys.exit(run_local(int(sys.argv[1]), main))
"""


@pytest.mark.parametrize("num_processes", [1, 3])
def test_gloo_and_the_store_give_the_same_bits(num_processes: int, tmp_path: Path) -> None:
    # As torchrun sets it: torch's own meeting place would wait for the agent's store at the address it is given.
    environment = {**os.environ, "TORCHELASTIC_USE_AGENT_STORE": "True"}
    command = [sys.executable, "-c", PROGRAM, str(num_processes)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
