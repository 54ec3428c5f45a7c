# make demo and make test set themselves up in .venv; nothing else is needed than Python 3.11 or 3.12, pip and make.

PYTHON ?= python3
# Where pip looks besides PyPI, whose torch for Linux carries CUDA: make demo PIP_EXTRA_INDEX=$(CPU_INDEX)
PIP_EXTRA_INDEX ?=
CPU_INDEX := https://download.pytorch.org/whl/cpu
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-cluster test-image test-gpu check format bench bench-gpu clean

help: ## this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

demo: $(READY) ## the main job on this machine: prepare, train elastically with losses, compare, generate, serve (3 minutes)
	$(BIN)/python examples/demo.py

# Two at a time: half of the time the tests wait. Files stay whole, for what their tests share is made once.
test: $(READY) ## all tests that need no cluster (9 minutes)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-slow: $(READY) ## a drill, two users at once, torchrun, Slurm and Compose: whole runs through kills and joins (25 minutes)
	$(BIN)/python -m pytest -m slow

test-cluster: $(READY) ## the job on a real Kubernetes control plane; needs root and apt (builds it once, 7 minutes; then 18)
	@tests/cluster/get-tools
	@tests/cluster/build-control-plane || [ $$? = 3 ]
	$(BIN)/python -m pytest -m cluster -rs tests/cluster

test-image: $(READY) ## the image, built and run in containers as on Kubernetes; needs root and apt (7 minutes, then 2)
	$(BIN)/python -m tests.image.build

test-gpu: $(READY) ## what only a CUDA GPU can show: its steps, memory, snapshots (not run yet; some minutes)
	$(BIN)/python -m pytest -m gpu -rs tests/gpu

check: $(READY) ## formatting, lint, types, one-way imports
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY) ## let ruff format and mend what it can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(READY) ## the benchmarks that need no GPU; figures are in docs/BENCHMARKS.md
	$(BIN)/python benchmarks/attention.py
	$(BIN)/python benchmarks/gradients.py

bench-gpu: $(READY) ## attention and training beside nanoGPT on a GPU: make bench-gpu NANOGPT=a-checkout-of-it
	@test -n "$(NANOGPT)" || { echo "error: NANOGPT is not given: make bench-gpu NANOGPT=path/to/nanoGPT"; exit 2; }
	$(BIN)/python benchmarks/attention.py --device cuda
	$(BIN)/python benchmarks/train.py --nanogpt $(NANOGPT) --size gpt2 --device cuda --threads 8 --compile

clean: ## what make demo and make test left behind, but for the data and runs of your own
	rm -rf $(VENV) demo .pytest_cache .mypy_cache .ruff_cache .import_linter_cache *.egg-info

# constraints.txt pins torch: without it pip may fetch another one, with gigabytes of CUDA libraries.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' \
	|| { echo "error: Python 3.11 or 3.12 is needed, this is $$($(PYTHON) -V): make PYTHON=python3.11 ..."; exit 1; }
	@echo "setting up $(VENV), once: about 0.5 GB to download (1.5 GB on disk) with torch for CPUs, 3 GB (6 GB) with CUDA"
	@[ -n "$(PIP_EXTRA_INDEX)" ] || command -v nvidia-smi >/dev/null \
	|| echo "there is no GPU here: PyPI's torch has CUDA, torch for CPUs comes with PIP_EXTRA_INDEX=$(CPU_INDEX)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	$(if $(PIP_EXTRA_INDEX),--extra-index-url $(PIP_EXTRA_INDEX)) -c constraints.txt -e '.[dev]'
	@touch $@
