#!/usr/bin/env bash
# The one test command: installs what the tests need in .venv, then runs ruff, mypy and pytest.
#
#     bash tests/run.sh                         everything
#     bash tests/run.sh tests/plan -k layout    arguments go to pytest
#
# Tests of Slurm, Open MPI and MPICH run where those are installed (Debian, as root: apt-get install slurm-wlm munge
# openmpi-bin mpich) and are skipped elsewhere.
# Exits non-zero when any of them fails. Variables: see launch/environment.sh.
set -uo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
bash launch/environment.sh test || exit
export PATH=$PWD/.venv/bin:$PATH
unset PYTHONPATH PYTHONHOME # the tests are of this tree, with .venv's packages
# torchrun's ranks meet at this machine's name unless told otherwise, and a bare machine may not know its own name.
export PET_LOCAL_ADDR=127.0.0.1

failed=()
step() {
    printf '\n$ %s\n' "$*"
    "$@" || failed+=("$1")
}

step ruff check .
step mypy --strict
step pytest "$@"

if ((${#failed[@]})); then
    echo "failed: ${failed[*]}" >&2
    exit 1
fi
