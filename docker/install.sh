#!/bin/sh
# install.sh VENV: makes the environment VENV with what ElasticGPT needs and without ElasticGPT, and takes out again what no
# container ever runs. The Dockerfile runs it beside pyproject.toml, with its build arguments as environment: VARIANT, EXTRAS,
# TORCH_VERSION, and pip's own.
set -eu
venv=$1

case $VARIANT in
cuda) ;; # PyPI's torch
*) export PIP_EXTRA_INDEX_URL="${PIP_EXTRA_INDEX_URL:-https://download.pytorch.org/whl/$VARIANT}" ;;
esac
if [ -n "$TORCH_VERSION" ]; then # what CUDA packages it asks for is its own affair then
    sed -i "s/^torch==.*/torch==$TORCH_VERSION/" constraints.txt
elif [ "$VARIANT" = cuda ]; then
    cat cuda-constraints.txt >>constraints.txt
fi

# The base's pip installs into the environment, so that the image has one pip and not two. The project is installed empty
# and taken out again: it brings its dependencies, and they make a layer that no change of the code touches.
python3 -m venv --without-pip "$venv"
touch README.md LICENSE # pyproject.toml names them
pip() { python3 -m pip --python "$venv/bin/python3" "$@"; }
pip install --no-cache-dir -c constraints.txt ".[$EXTRAS]"
pip uninstall --yes elastic-gpt

# An index that lacks the wanted build gives way to another one without a word, gigabytes too large or without CUDA.
torch=$("$venv/bin/python3" -c 'from importlib.metadata import version; print(version("torch"))')
case $VARIANT:$torch in
cuda:*+cpu) ;;
cuda:* | *+"$VARIANT") right=yes ;;
esac
if [ -z "${right:-}" ]; then
    echo "error: VARIANT is $VARIANT, but pip found torch $torch: let PIP_EXTRA_INDEX_URL name an index that has it" >&2
    exit 1
fi

# Tests, C++ test programs, static libraries, and the headers for a compiler that the CPU variant does not have: 300 MB. The
# compiled *.pyc stay: on a read-only file system nobody could make them, and each process would compile what it imports,
# 6 s for torch.
cd "$venv"/lib/python3*/site-packages
find . -type d \( -name tests -o -name test \) -prune -exec rm -r {} +
find torch/bin -type f ! -name torch_shm_manager -delete
find . -name '*.a' -delete
rm -rf torch/share
if [ "$VARIANT" = cpu ]; then rm -r torch/include; fi
