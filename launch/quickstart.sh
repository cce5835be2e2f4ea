#!/usr/bin/env bash
# From nothing to a TensorRT-LLM export: environment, a small real Megatron checkpoint, inspect, plan, export, result.
#
#     bash launch/quickstart.sh
#
# Needs Python 3.10 or newer with venv; no GPU. Writes .venv and quickstart_output in this repository, and may be run
# again. Variables: see launch/environment.sh.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
checkpoint=quickstart_output/checkpoint
export=quickstart_output/export

heading() { printf '\n== %s\n' "$*"; }
run() {
    printf '$ %s\n' "$*"
    "$@"
}

heading "1/6 Environment"
bash launch/environment.sh quickstart
export PATH=$PWD/.venv/bin:$PATH
unset PYTHONPATH PYTHONHOME
export OMP_NUM_THREADS=1 # torchrun would set it and warn
# torchrun's ranks meet at this machine's name unless told otherwise, and a bare machine may not know its own name.
export PET_LOCAL_ADDR=127.0.0.1
echo ".venv: $(python --version), torch $(python -c 'from importlib.metadata import version; print(version("torch"))')"

heading "2/6 A Megatron checkpoint: Llama-style, random weights, saved by four processes as tp 2 x pp 2"
rm -rf "$checkpoint"
mkdir -p quickstart_output
run python launch/make_checkpoint.py "$checkpoint" --tp 2 --pp 2 --layers 4 --hidden 512 --heads 16 --vocab 8000

heading "3/6 What is in it"
run dist-export inspect "$checkpoint"

heading "4/6 What an export to tp 4 x pp 1 would read and write"
run dist-export plan "$checkpoint" --tp 4 --pp 1

heading "5/6 The export, by two processes"
run torchrun --nproc-per-node 2 launch/export.py "$checkpoint" "$export" --tp 4 --pp 1 --overwrite

heading "6/6 The result"
run ls -l "$export"
run python launch/quickstart_result.py "$checkpoint" "$export"
