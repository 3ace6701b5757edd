# Targets make their own environment; a second run starts at once.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.installed
TRAIN_ARGS ?= --family llama --preset debug --mesh fsdp=2,tp=2 --steps 200 --seed 0

.DEFAULT_GOAL := help
.PHONY: help setup train test lint sweep bench clean

help:
	@echo "make train   train the debug Llama on fsdp=2,tp=2 (TRAIN_ARGS=... for another run)"
	@echo "make test    lint, types and every test"
	@echo "make lint    ruff and basedpyright alone"
	@echo "make sweep   what takes long: parity on every mesh, memory, operators and edited tables by brute force"
	@echo "make bench   time and memory against hand-written code"
	@echo "make clean   remove the environment and what runs left"

$(READY): pyproject.toml constraints.txt
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

setup: $(READY)

train: $(READY)
	$(PY) -m models.train $(TRAIN_ARGS)

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m basedpyright

test: lint
	$(PY) -m pytest -q tests

sweep: $(READY)
	$(PY) -m benchmarks.sweep
	$(PY) -m benchmarks.pipelines
	$(PY) -m benchmarks.axes
	$(PY) -m benchmarks.context
	$(PY) -m benchmarks.gallery
	$(PY) -m benchmarks.operators
	$(PY) -m benchmarks.mutations
	$(PY) -m benchmarks.legal
	$(PY) -m benchmarks.resharding --write
	$(PY) -m benchmarks.kills --write
	$(PY) -m benchmarks.memory

bench: $(READY)
	$(PY) -m benchmarks.bench $(ARGS)

clean:
	rm -rf $(VENV) runs build dist .pytest_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
