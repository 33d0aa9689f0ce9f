#!/bin/sh
# Installs everything into the project's own .venv; called by all `make` targets that need Python.
# Does and says nothing when .venv holds what requirements.lock and pyproject.toml ask for.
# Another interpreter: `make setup PYTHON=python3.12` (after removing a .venv of another version).
set -eu
cd "$(dirname "$0")/.."

UV_VERSION=0.13.9
NEEDED_GB=8 # 6.2 GB when installed; uv's cache takes no more where it is on the same disk
STAMP=.venv/installed-from
venv_python=.venv/bin/python

say() { printf 'setup: %s\n' "$*"; }
stop() {
    printf 'setup: %s\n' "$*" >&2
    exit 1
}

# The content of the inputs, not their dates, and the folder's place: a moved .venv does not work.
wanted="$(cat requirements.lock pyproject.toml .ci/setup.sh | cksum) $(pwd)"
if [ -x "$venv_python" ] && [ "$(cat "$STAMP" 2>/dev/null)" = "$wanted" ]; then
    exit 0
fi

is_supported() {
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null
}

find_python() {
    for candidate in ${PYTHON:-python3 python3.12 python3.13 python3.11 python}; do
        if is_supported "$candidate"; then
            command -v "$candidate"
            return
        fi
    done
    if [ -n "${PYTHON:-}" ]; then
        stop "PYTHON=$PYTHON is not Python 3.11, 3.12 or 3.13, or cannot be run"
    fi
    stop "no Python 3.11, 3.12 or 3.13 on PATH; install one, or name it: make setup PYTHON=/path/to"
}

check_disk() { # check_disk FOLDER: of the nearest folder that exists
    folder=$1
    while [ ! -d "$folder" ]; do folder=$(dirname "$folder"); done
    free_kb=$(df -Pk "$folder" | awk 'NR == 2 { print $4 }')
    if [ "$free_kb" -lt $((NEEDED_GB * 1000 * 1000)) ]; then
        free_gb=$((free_kb / 1000 / 1000))
        stop "installing needs about $NEEDED_GB GB free at $folder, and $free_gb GB are free"
    fi
}

check_compiler() { # a warning: only what uses DeepSpeed's operations needs these two
    if ! { command -v "${CXX:-c++}" || command -v g++ || command -v clang++; } >/dev/null 2>&1; then
        say "warning: no C++ compiler found; DeepSpeed builds its operations with one at first use"
        say "  Debian, Ubuntu: apt install g++; Fedora, RHEL: dnf install gcc-c++; macOS: Xcode"
    fi
    headers=$("$venv_python" -c 'import sysconfig; print(sysconfig.get_path("include"))')
    if [ ! -f "$headers/Python.h" ]; then
        say "warning: no Python headers found; DeepSpeed builds its operations with them"
        say "  Debian, Ubuntu: apt install python3-dev; Fedora, RHEL: dnf install python3-devel"
    fi
}

is_in_place() { # made here, or not by this script
    case "$(cat "$STAMP" 2>/dev/null)" in '' | *" $(pwd)") true ;; *) false ;; esac
}

if is_supported "$venv_python" && is_in_place; then
    if [ -n "${PYTHON:-}" ]; then say "keeping the Python of .venv; remove .venv to change it"; fi
else
    python=$(find_python)
    "$python" -c 'import ensurepip, venv' 2>/dev/null ||
        stop "$python cannot make a virtual environment; Debian, Ubuntu: apt install python3-venv"
    check_disk .
    check_disk "${UV_CACHE_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/uv}"
    say "making .venv with $("$python" --version) ($python)"
    "$python" -m venv --clear .venv
fi
if [ "$(uname -s)" = Darwin ]; then say "warning: macOS is not tested; Linux is"; fi
check_compiler

"$venv_python" -m pip --version >/dev/null 2>&1 || "$venv_python" -m ensurepip --upgrade >/dev/null
"$venv_python" -m uv --version 2>/dev/null | grep -q "^uv $UV_VERSION" ||
    "$venv_python" -m pip install --quiet --disable-pip-version-check "uv==$UV_VERSION"
# `make lock` must work when the present lock cannot be installed.
if [ "${1:-}" = uv-only ]; then exit 0; fi

say "installing requirements.lock (about 3 GB to download the first time)"
# The lock also names setuptools: what is built from source is built with a known version of it.
"$venv_python" -m uv pip install --python "$venv_python" --require-hashes \
    --build-constraints requirements.lock --requirements requirements.lock
"$venv_python" -m uv pip install --python "$venv_python" --quiet --no-deps \
    --build-constraints requirements.lock --editable .
printf '%s\n' "$wanted" >"$STAMP"
say "ready: .venv with $("$venv_python" --version)"
