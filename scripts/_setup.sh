# Sourced by scripts/demo and scripts/test: a virtual environment with the package in it, made once.
# It is made again when pyproject.toml, constraints.txt or the C source changes. VENV and PYTHON may be set from outside.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
VENV="${VENV:-.venv}"
stamp="$VENV/.stamp-$1"
if [ ! -e "$stamp" ] || [ -n "$(find pyproject.toml constraints.txt hf_flash/compute/*.[ch] -newer "$stamp")" ]; then
    echo "setting up $VENV ..."
    [ -x "$VENV/bin/python" ] || "${PYTHON:-python3}" -m venv "$VENV"
    # torch first: the pinned build is a CPU build where one is offered; a plain "torch" may bring gigabytes of CUDA
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check -c constraints.txt -e "$2"
    touch "$stamp"
fi
