#!/usr/bin/env bash
# Installs the wheel in dist/ in the ways that its users do, and tries what is then there: the program, the manual, the completions.
#
#     try_install.sh PYTHON [WAY]...      default: all of them, as below in `ways`
#
# PYTHON has pip, and uv beside it. All but `venv` fetch packages; of them, `make package` runs `venv` only.
set -euo pipefail
cd "$(dirname "$0")/.."

python=$(realpath --no-symlinks "$1")
uv=$(dirname "$python")/uv
shift
ways=(venv pip uv-tool uvx pipx)
[ $# -eq 0 ] || ways=("$@")
share=$(realpath share) wheel=$(realpath dist/portexec-*.whl)

place=$(mktemp --directory)
trap 'rm -rf "$place"' EXIT
spaced="$place/with a space"
export HOME="$spaced/home" UV_CACHE_DIR="${UV_CACHE_DIR:-$HOME/.cache/uv}" PIP_CACHE_DIR="${PIP_CACHE_DIR:-$HOME/.cache/pip}"
export UV_PYTHON=$python UV_PYTHON_DOWNLOADS=never UV_TOOL_DIR="$spaced/tools" UV_TOOL_BIN_DIR="$spaced/bin"
export PIPX_HOME="$spaced/pipx" PIPX_BIN_DIR="$spaced/pipx bin" PIP_DISABLE_PIP_VERSION_CHECK=1
mkdir --parents "$HOME"
cd "$spaced" # where no portexec is

make_venv() { # at $1, without a pip of its own
    "$python" -m venv --without-pip "$1"
}

try_program() { # the words that run it
    local said
    "$@" --version
    said=$("$@" -q -H fd -- sh -c 'echo "$PORT"')
    [[ $said =~ ^[0-9]+$ ]] || { echo "$* gave the port $said" >&2; return 1; }
    "$@" -q -l api=0 --then 'echo "at {url}"' -- "$python" -c '
import os, socket
serves = socket.create_server(("127.0.0.1", int(os.environ["PORT"])))
while True:
    serves.accept()[0].close()'
}

try_share() { # at $1
    local file
    for file in man/man1/portexec.1 bash-completion/completions/portexec zsh/site-functions/_portexec \
        fish/vendor_completions.d/portexec.fish; do
        cmp "$share/$file" "$1/share/$file"
    done
}

try_readme() { # at $1, as an index shows it: a link has a whole address
    local metadata=("$1"/lib/python*/site-packages/portexec-*.dist-info/METADATA)
    grep --quiet '](https://.*/docs/' "${metadata[0]}" || { echo "no README in ${metadata[0]}" >&2; return 1; }
    ! grep --line-number --extended-regexp '\]\([^h]' "${metadata[0]}" || return 1
}

try_venv() { # the program alone needs no other package
    make_venv "$spaced/venv"
    "$python" -m pip --quiet --python "$spaced/venv/bin/python" install --no-index --no-deps "$wheel"
    try_program "$spaced/venv/bin/portexec"
    try_readme "$spaced/venv"
    try_share "$spaced/venv"
}

try_pip() { # with all that the Python API and the env files need
    make_venv "$spaced/pip"
    "$python" -m pip --quiet --python "$spaced/pip/bin/python" install "$wheel"
    try_program "$spaced/pip/bin/python" -m portexec
    echo GREETING='at ${PORT}' >"$spaced/.env"
    "$spaced/pip/bin/portexec" -q --env-file "$spaced/.env" -- sh -c 'echo "$GREETING"'
    "$spaced/pip/bin/python" -c 'import portexec
with portexec.serve(["python3", "-m", "http.server", "{port}"]) as server:
    print(server.url)'
}

try_uv-tool() {
    "$uv" tool install --quiet "$wheel"
    try_program "$UV_TOOL_BIN_DIR/portexec"
    try_share "$UV_TOOL_DIR/portexec"
}

try_uvx() {
    try_program "$uv" tool run --quiet --from "$wheel" portexec
}

try_pipx() {
    make_venv "$spaced/for pipx"
    "$python" -m pip --quiet --python "$spaced/for pipx/bin/python" install pipx
    "$spaced/for pipx/bin/python" -m pipx install --quiet --python "$python" "$wheel"
    try_program "$PIPX_BIN_DIR/portexec"
    try_share "$PIPX_HOME/venvs/portexec"
}

for way in "${ways[@]}"; do
    echo "== installed: $way"
    "try_$way"
done
