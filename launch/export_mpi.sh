#!/usr/bin/env bash
# Export a Megatron checkpoint with the processes of mpirun (Open MPI, MPICH, Intel MPI).
#
#     bash launch/export_mpi.sh CHECKPOINT OUTPUT --tp 4 --pp 2          starts mpirun
#     mpirun -np 8 launch/export_mpi.sh CHECKPOINT OUTPUT --tp 4 --pp 2  is one rank of it
#
# The arguments are those of launch/export.py. MPI starts the processes; it carries no data. When a rank is killed,
# Open MPI started here gives the others time to say which; MPICH ends them at once and says itself what was killed.
# Variables:
#   NUM_PROCESSES   processes in all (default: the hostfile's slots, else this machine's cores)
#   HOSTFILE        one host per line, "node1 slots=8" or "node1:8"; the first one runs rank 0
#   MPIRUN          the program (default: mpirun)
#   MPIRUN_ARGS     further arguments for it, such as "--map-by node"
#   FORWARD         names of further environment variables that all ranks get
#   MASTER_ADDR     where all nodes reach rank 0 (default: the hostfile's first host), MASTER_PORT (default: a free one)
#   PYTHON          the interpreter (default: this repository's .venv, else python3)
#   EXPORT_PROGRAM  what every rank runs (default: launch/export.py beside this script)
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-$here/../.venv/bin/python}
[[ -n ${PYTHON:-} || -x $python ]] || python=python3
program=${EXPORT_PROGRAM:-$here/export.py}

for argument in "$@"; do
    if [[ $argument == -h || $argument == --help ]]; then
        sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
        echo
        exec "$python" "$program" --help
    fi
done

# A rank: mpirun, not the user, started this script.
if [[ -n ${OMPI_COMM_WORLD_RANK:-}${PMI_RANK:-} ]]; then
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
    exec "$python" "$program" "$@"
fi

# Prints "HOST SLOTS" for every line of the hostfile.
hosts() {
    sed -E 's/#.*//; s/^[[:space:]]+//; /^$/d' "$HOSTFILE" |
        sed -nE 's/^([^[:space:]:]+)(:| .*slots *= *)?([0-9]+)?.*/\1 \3/p' | awk '{ print $1, ($2 == "" ? 1 : $2) }'
}

nodes=1
if [[ -n ${HOSTFILE:-} ]]; then
    nodes=$(hosts | cut -d ' ' -f 1 | sort -u | wc -l)
    first=$(hosts | awk 'NR == 1 { print $1 }')
    slots=$(hosts | awk '{ sum += $2 } END { print sum + 0 }')
    if [[ -z $first ]]; then
        echo "export_mpi.sh: HOSTFILE=$HOSTFILE names no host" >&2
        exit 2
    fi
fi
num_processes=${NUM_PROCESSES:-${slots:-$(nproc)}}
command -v "${MPIRUN:-mpirun}" >/dev/null || {
    echo "export_mpi.sh: ${MPIRUN:-mpirun} is not there: install Open MPI or MPICH, or set MPIRUN" >&2
    exit 2
}
version=$("${MPIRUN:-mpirun}" --version 2>&1 || true)

# Where rank 0 can be reached. A port that is free here is most likely free on the first host too. Within a batch
# system's allocation, without a hostfile, the ranks find out themselves.
if [[ -n ${first:-} || -z ${SLURM_JOB_ID:-}${PBS_JOBID:-}${LSB_JOBID:-} ]]; then
    ((nodes > 1)) && default=${first:-} || default=127.0.0.1
    [[ $nodes -eq 1 && -n ${first:-} && $first != localhost && $first != "$(hostname)" ]] && default=$first
    export MASTER_ADDR=${MASTER_ADDR:-$default}
    export MASTER_PORT=${MASTER_PORT:-$("$python" -c \
        'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')}
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} PYTHON=$python EXPORT_PROGRAM=$program

names=(MASTER_ADDR MASTER_PORT OMP_NUM_THREADS PYTHON EXPORT_PROGRAM PATH LD_LIBRARY_PATH PYTHONPATH VIRTUAL_ENV
    CUDA_VISIBLE_DEVICES TMPDIR)
read -ra extra <<<"${FORWARD:-}"
forwarded=()
for name in "${names[@]}" ${extra[@]+"${extra[@]}"}; do
    [[ -n ${!name+x} ]] && forwarded+=("$name")
done

command=("${MPIRUN:-mpirun}" -np "$num_processes")
case $version in
*"Open MPI"* | *OpenRTE* | *PRRTE*)
    [[ -n ${HOSTFILE:-} ]] && command+=(--hostfile "$HOSTFILE")
    [[ -z ${HOSTFILE:-} ]] && ((num_processes > $(nproc))) && command+=(--oversubscribe)
    ((EUID == 0)) && command+=(--allow-run-as-root)
    command+=(--bind-to none) # a rank has several threads
    # After a failure the ranks find out who failed and say so, which takes seconds. mpirun waits this long twice.
    export OMPI_MCA_odls_base_sigkill_timeout=5 PRTE_MCA_odls_base_sigkill_timeout=5
    for name in "${forwarded[@]}"; do command+=(-x "$name"); done
    ;;
*) # Intel MPI and MPICH share Hydra's options
    [[ -n ${HOSTFILE:-} ]] && command+=(-f "$HOSTFILE")
    list=$(IFS=,; echo "${forwarded[*]}")
    command+=(-genvlist "$list")
    ;;
esac
read -ra more <<<"${MPIRUN_ARGS:-}"
exec "${command[@]}" ${more[@]+"${more[@]}"} bash "$here/export_mpi.sh" "$@"
