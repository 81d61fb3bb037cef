#!/usr/bin/env bash
# Makes .venv and installs requirements/NAME.txt and this checkout into it; gpu-compiler goes into a folder of its own
# there, because JAX would look for a GPU where it finds that. Run by make:
#     bash scripts/setup_env.sh NAME [INTERPRETER]
# Without an interpreter it takes the first suitable Python that it finds on this machine.
set -euo pipefail
shopt -s nullglob
cd "$(dirname "$0")/.."
name=$1 interpreter=${2:-}
home=${HOME:-/root}
data=${XDG_DATA_HOME:-$home/.local/share}

# The locked versions have wheels for these, and a virtual environment needs the modules that a few distributions split off.
suitable() {
    "$1" -c '
import sys, sysconfig
assert (3, 12) <= sys.version_info < (3, 15) and not sysconfig.get_config_var("Py_GIL_DISABLED")
import ctypes, ensurepip, ssl, venv
' 2>/dev/null
}

candidates() {
    type -ap python3.13 python3.12 python3.14 python3 python || true
    # pyenv's shims refuse to run a version that is not the selected one; the interpreters themselves run.
    printf '%s\n' "${PYENV_ROOT:-$(pyenv root 2>/dev/null || echo "$home/.pyenv")}"/versions/3.1[234]*/bin/python
    if command -v uv >/dev/null; then UV_PYTHON_DOWNLOADS=never uv python find '>=3.12,<3.15' 2>/dev/null || true; fi
    printf '%s\n' "$data"/uv/python/cpython-3.1[234]*/bin/python3 "$data"/mise/installs/python/3.1[234]*/bin/python \
        "$home"/.asdf/installs/python/3.1[234]*/bin/python "$home"/.local/bin/python3.1[234] \
        /usr/local/bin/python3.1[234] /opt/homebrew/bin/python3.1[234] /opt/python*/bin/python3 \
        /opt/python/cp31[234]-cp31[234]/bin/python /usr/local/python*/bin/python3 \
        "$home"/{miniconda3,miniforge3,anaconda3}/bin/python /opt/{conda,miniconda3,miniforge3}/bin/python
}

find_python() {
    local candidate
    while read -r candidate; do
        if suitable "$candidate"; then echo "$candidate" && return; fi
    done < <(candidates)
    cat >&2 <<'END'
No Python 3.12, 3.13 or 3.14 (with venv, ssl and ctypes) was found on this machine. Any one of these brings it:
    uv python install 3.13
    pyenv install 3.13
    sudo apt install python3.13 python3.13-venv      (brew install python@3.13 on macOS)
or name the one you have:  make demo PYTHON=/path/to/python3.13
END
    return 1
}

# One line for the whole installation: a counter in a terminal, a start and an end elsewhere.
show_progress() {
    local total=$1 count=0 line
    while read -r line; do
        case $line in
            Collecting* | Processing*) count=$((count + 1)) && line="[$count/$total] ${line#* }" ;;
            "Installing collected"*) line="[$total/$total] unpacking" ;;
            *) continue ;;
        esac
        if [ -t 1 ]; then printf '\r\033[K%s' "${line%% (from*}"; fi
    done
    if [ -t 1 ]; then printf '\r\033[K'; fi
}

# Another lock means another environment: nothing of the old one stays behind.
checksum=$(cat requirements/*.txt | cksum)
if [ "$(cat .venv/lock.cksum 2>/dev/null)" != "$checksum" ] || ! .venv/bin/python -c '' 2>/dev/null; then
    if [ -z "$interpreter" ]; then
        interpreter=$(find_python)
    elif ! suitable "$interpreter"; then
        echo "PYTHON=$interpreter is not a Python 3.12, 3.13 or 3.14 with venv, ssl and ctypes" >&2
        exit 1
    fi
    echo "making .venv with $("$interpreter" --version) ($interpreter)"
    "$interpreter" -m venv --clear .venv
    echo "$checksum" >.venv/lock.cksum
fi

pip=(.venv/bin/python -m pip --disable-pip-version-check install --no-deps --no-compile)
echo "installing requirements/$name.txt"
if [ "$name" = gpu-compiler ]; then
    "${pip[@]}" --only-binary=:all: --upgrade --target .venv/gpu-compiler -r requirements/gpu-compiler.txt | show_progress 1
else
    total=$(sed '/^#/d; /^-r/d' requirements/demo.txt requirements/"$name".txt | sort -u | wc -l)
    "${pip[@]}" --only-binary=:all: -r requirements/"$name".txt | show_progress "$((total))"
    "${pip[@]}" --quiet --no-build-isolation --editable .
fi
touch .venv/"$name".stamp
