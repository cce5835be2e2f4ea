#!/usr/bin/env bash
# Make this repository's virtual environment, .venv, and install the package in it with one of its extras:
#
#     bash launch/environment.sh test
#
# Does nothing when that is done already and none of the files that decide on it has changed. Variables:
#   PYTHON             the interpreter to start from, 3.10 or newer (default: python3)
#   TORCH_REQUIREMENT  what pip installs as torch, such as 'torch==2.6.0' or the path of a wheel
#                      (default: the version in tests/constraints.txt)
set -euo pipefail

extra=${1:?usage: bash launch/environment.sh EXTRA   (an extra of setup.cfg, such as test)}
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
venv=$PWD/.venv
constraints=tests/constraints.txt
torch=${TORCH_REQUIREMENT:-$(grep '^torch==' "$constraints")}

if ! "$python" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
    echo "$python is not a Python of at least 3.10 with venv. On Debian: apt-get install python3 python3-venv" >&2
    echo "or name another interpreter: PYTHON=/path/to/python3 bash ..." >&2
    exit 2
fi

exec 9<launch # two runs at once would disturb each other: the second waits here
flock 9

# An environment that was moved with the repository has the old path in its scripts, so it is made afresh.
if ! grep -qsF "$venv" "$venv/bin/activate" || ! "$venv/bin/python" -c '' 2>/dev/null; then
    echo "making $venv"
    "$python" -m venv --clear "$venv"
fi

digest=$({ cat setup.cfg pyproject.toml "$constraints"; echo "$torch"; "$venv/bin/python" --version; } | sha256sum)
digest=${digest%% *}
installed=$venv/installed # a line "DIGEST EXTRA" for each extra that is installed
if ! grep -qsx "$digest $extra" "$installed"; then
    echo "installing $torch and what '$extra' needs (minutes the first time)"
    "$venv/bin/python" -m pip install -qq --disable-pip-version-check --no-input \
        --constraint <(grep -v '^torch==' "$constraints") "$torch" --editable ".[$extra]"
    { grep -s "^$digest " "$installed" || true; echo "$digest $extra"; } >"$installed.new"
    mv "$installed.new" "$installed"
fi
