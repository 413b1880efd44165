#!/usr/bin/env bash
# Makes .venv with everything that `make demo` and `make test` need. Safe to run again.
#
#   PYTHON       the Python to start from, 3.10 or later (python3)
#   VENV         the environment to make (.venv)
#   PINS         further requirements, to choose versions ("transformers==5.19.0"); `floors`: the lowest of everything
#                that pyproject.toml takes, but for PyTorch
#   TORCH        what to install where that Python has no PyTorch of its own
#   TORCH_INDEX  CPU-only builds of it, a tenth of the size, for Linux machines without an NVIDIA GPU
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
TORCH=${TORCH:-torch==2.13.0}
TORCH_INDEX=${TORCH_INDEX:-https://download.pytorch.org/whl/cpu}
VENV=${VENV:-.venv}
PINS=${PINS:-}

has_torch() { # a PyTorch that imports and is new enough
    "$1" -c 'import torch; raise SystemExit(tuple(map(int, torch.__version__.split(".")[:2])) < (2, 10))' 2>/dev/null
}

"$PYTHON" -c 'import sys; raise SystemExit(sys.version_info < (3, 10))' || {
    echo "error: $PYTHON is missing or older than Python 3.10; choose another with make PYTHON=python3.12" >&2
    exit 1
}

if ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
    own=()
    # A machine that has PyTorch, perhaps one built for its GPU, keeps it.
    if has_torch "$PYTHON"; then own=(--system-site-packages); fi
    "$PYTHON" -m venv --clear ${own[@]+"${own[@]}"} "$VENV" || {
        echo "error: $PYTHON can't make virtual environments; on Debian and Ubuntu: apt install python3-venv" >&2
        exit 1
    }
fi

if ! has_torch "$VENV/bin/python"; then
    index=()
    # Asked first: pip would retry an index that can't be reached five times for every package.
    if [[ "$(uname -sm)" == "Linux x86_64" ]] && ! command -v nvidia-smi >/dev/null &&
        "$VENV/bin/python" -c 'import sys, urllib.request as u; u.urlopen(sys.argv[1] + "/torch/", timeout=5)' \
            "$TORCH_INDEX" 2>/dev/null; then
        index=(--extra-index-url "$TORCH_INDEX")
    fi
    "$VENV/bin/python" -m pip install "$TORCH" ${index[@]+"${index[@]}"}
fi

if [[ "$PINS" == floors ]]; then
    # What installing and running takes, from the lines of pyproject.toml that say "name>=version"; not the tests' tools.
    PINS=$(sed -n '/^dependencies/,/^cli/p; /^quant/p; /^serve/p' pyproject.toml | grep -o '"[a-z-]*>=[0-9.]*' | tr -d '"' | grep -v '^torch' |
        sed 's/>=/==/' | tr '\n' ' ')
fi
read -ra pins <<<"$PINS"
"$VENV/bin/python" -m pip install --quiet --editable '.[test]' ${pins[@]+"${pins[@]}"}
