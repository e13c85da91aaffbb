# Sourced by run and nightly: the commands that documents show, and clones of this checkout to run them in.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() {
    echo "$1" >&2
    exit 1
}

mapfile -t commands < <(grep -E '^python3 -m venv ' README.md)
[ "${#commands[@]}" -eq 2 ] || fail "README.md must hold two commands that start with 'python3 -m venv'"
main_job=${commands[0]} default_tests=${commands[1]}
parity=$(grep -E '^\.venv/bin/pip install torch' docs/parity.md) ||
    fail "docs/parity.md must hold the line that installs PyTorch and runs the parity tests"
mapfile -t versions < <(grep -oE 'Python :: 3\.[0-9]+' pyproject.toml | grep -oE '3\.[0-9]+' | sort -V)

# Clones, environments and caches begin empty and are removed at the end.
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

# find_python VERSION: prints the first such Python of the PATH, pyenv and uv that can make environments.
find_python() {
    local candidate
    for candidate in "python$1" "${PYENV_ROOT:-$HOME/.pyenv}/versions/$1".*/bin/python3 \
        "$HOME/.local/share/uv/python/cpython-$1".*/bin/python3 python3; do
        if [ "$("$candidate" -c 'import sys, venv, ensurepip; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)" = "$1" ]; then
            "$candidate" -c 'import sys; print(sys.executable)'
            return
        fi
    done
}

# enter VERSION: goes into the clone for this Python, which is made at the first call, with it as `python3` on the PATH.
enter() {
    local home="$scratch/$1" python
    if [ ! -d "$home" ]; then
        python=$(find_python "$1")
        [ -n "$python" ] || fail "Python $1 cannot make virtual environments here: install its venv module"
        mkdir -p "$home/bin"
        printf '#!/bin/sh\nexec "%s" "$@"\n' "$python" > "$home/bin/python3"
        chmod +x "$home/bin/python3"
        git clone --quiet . "$home/clone"
    fi
    export PATH="$home/bin:$PATH" XDG_CACHE_HOME="$home/cache"
    cd "$home/clone"
}

# step NAME COMMAND: runs a line of bash and prints its name, itself and its time.
step() {
    local begin=$SECONDS
    echo "== $1: $2"
    bash -euo pipefail -c "$2"
    echo "== $1 took $((SECONDS - begin)) s"
}

# Of the oldest and the newest Python that pyproject.toml names, and so of jax, those that this machine has.
pythons=()
for version in "${versions[0]}" "${versions[-1]}"; do
    if [ -n "$(find_python "$version")" ]; then
        pythons+=("$version")
    else
        echo "== Python $version is not on this machine"
    fi
done
if [ "${#pythons[@]}" -eq 0 ]; then
    pythons=("$(python3 -c 'import sys; print("%d.%d" % sys.version_info[:2])')")
    echo "== Python ${pythons[0]} instead"
fi
