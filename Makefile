# make demo and make test set themselves up in .venv; nothing else is needed than Python 3.11 or 3.12, pip and make.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-cluster test-image check format bench clean

help: ## this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

demo: $(READY) ## the main job on this machine: prepare, train elastically with losses, compare, generate (3 minutes)
	$(BIN)/python examples/demo.py

# Two at a time: half of the time the tests wait. Files stay whole, for what their tests share is made once.
test: $(READY) ## all tests that need no cluster (8 minutes)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-slow: $(READY) ## a short drill: kills and joins at random, all laws held (1 minute and a half)
	$(BIN)/python -m pytest -m slow

test-cluster: $(READY) ## the job on a real Kubernetes control plane; needs root and apt (builds it once, 7 minutes; then 13)
	$(BIN)/python -m pytest -m cluster tests/cluster

test-image: $(READY) ## the image, built and run in containers as on Kubernetes; needs root and apt (4 minutes, then 1)
	$(BIN)/python -m tests.image.build

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

clean: ## what make demo and make test left behind, but for the data and runs of your own
	rm -rf $(VENV) demo .pytest_cache .mypy_cache .ruff_cache .import_linter_cache *.egg-info

# constraints.txt pins torch: without it pip may fetch another one, with gigabytes of CUDA libraries.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' \
	|| { echo "error: Python 3.11 or 3.12 is needed, this is $$($(PYTHON) -V): make PYTHON=python3.11 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@
