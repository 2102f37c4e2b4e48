#!/bin/sh
# Make VENV hold exactly what LOCK pins, and this project in editable form.
# Called by `make install`, which decides whether there is anything to do.
#   usage: PYTHON=... TORCH_INDEX=... requirements/install.sh VENV LOCK
set -eu

venv=$1
lock=$2
torch_index=${TORCH_INDEX:-https://download.pytorch.org/whl/cpu}
export PIP_DISABLE_PIP_VERSION_CHECK=1
export PIP_NO_INPUT=1

say() { echo "install: $*"; }
fail() {
    echo "install: $*" >&2
    exit 1
}

is_supported() {
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null
}

find_python() {
    if [ -n "${PYTHON:-}" ]; then
        command -v "$PYTHON" >/dev/null || fail "PYTHON=$PYTHON is no command here"
        is_supported "$PYTHON" || fail "PYTHON=$PYTHON is $("$PYTHON" --version 2>&1 || true);" \
            "Python 3.11, 3.12 or 3.13 is needed"
        echo "$PYTHON"
        return
    fi
    for candidate in python3.11 python3 python3.12 python3.13; do
        if is_supported "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    fail "Python 3.11, 3.12 or 3.13 is needed; python3 is $(python3 --version 2>&1 || true)." \
        "Name another with: make install PYTHON=/path/to/python3.11"
}

pip() { "$venv/bin/python" -m pip "$@"; }

# The CPU build of torch has a version of its own (+cpu), which the ordinary index may not have.
install_torch() {
    log="$venv/torch-install.log"
    if pip install --no-deps "$1" 2>"$log"; then
        return
    fi
    say "$1 is not on the package index; trying $torch_index (TORCH_INDEX= names another)"
    if pip install --no-deps --retries 1 --timeout 60 --index-url "$torch_index" "$1" 2>>"$log"; then
        return
    fi
    fail "$1 is neither on the package index nor on $torch_index; name an index that has it:" \
        "make install TORCH_INDEX=URL (what pip said: $log)"
}

if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    python=$(find_python)
    say "creating $venv with $("$python" --version)"
    "$python" -m venv --clear "$venv" ||
        fail "$python has no working venv module (on Debian and Ubuntu: apt-get install python3-venv)"
fi
is_supported "$venv/bin/python" || fail "$venv is $("$venv/bin/python" --version);" \
    "Python 3.11, 3.12 or 3.13 is needed: make clean, then make install PYTHON=..."

say "installing $lock (about 200 packages; the first time takes minutes)"
torch=$(sed -n 's/^\(torch==[^ ;]*\).*/\1/p' "$lock")
case $torch in
*+cpu) install_torch "$torch" ;;
esac
pip install --no-deps -r "$lock"

say "installing emo-serve itself, editable"
pip install --no-deps --no-build-isolation --quiet -e .

if ! "$venv/bin/python" -c 'import ctypes; ctypes.CDLL("libnuma.so.1")' 2>/dev/null; then
    say "warning: vLLM needs the system library libnuma.so.1 (on Debian and Ubuntu:" \
        "apt-get install libnuma1)"
fi
say "done: $venv/bin/emo-serve"
