"""The mpirun of Open MPI and that of MPICH."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass

import pytest

MPIRUNS = {"openmpi": ("mpirun.openmpi", "mpirun"), "mpich": ("mpirun.mpich", "mpirun.hydra", "mpirun")}
SIGNS = {"openmpi": ("Open MPI", "OpenRTE"), "mpich": ("HYDRA",)}


@dataclass(frozen=True)
class Mpirun:
    """One of the two."""

    flavour: str
    path: str

    def command(self, *program: object, num_ranks: int = 4) -> list[object]:
        """mpirun itself with ranks of a program."""
        options = ["--oversubscribe"] if self.flavour == "openmpi" else []
        options += ["--allow-run-as-root"] if self.flavour == "openmpi" and os.geteuid() == 0 else []
        return [self.path, "-np", num_ranks, *options, *program]


def find_mpirun(flavour: str) -> Mpirun:
    """The flavour's mpirun; the test is skipped where there is none."""
    for name in MPIRUNS[flavour]:
        path = shutil.which(name)
        if path is None:
            continue
        version = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=60)
        if any(sign in version.stdout + version.stderr for sign in SIGNS[flavour]):
            return Mpirun(flavour, path)
    pytest.skip(f"{flavour} is not installed (Debian: apt-get install openmpi-bin mpich)")
