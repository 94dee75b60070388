# Two commands for a newcomer: `make demo` and `make test`. Each does its own set-up.
PYTHON ?= python3
# Another torch build: make setup TORCH="torch==2.11.0 --index-url URL"
TORCH ?= "torch>=2.11,<2.14"

VENV := .venv
BIN := $(VENV)/bin
SOURCES := protos/api_page.py kernels server trainer benchmarks tests
# Tests that start servers or run one here, and wait for them: what a busy machine can spoil.
SERVING := tests/cli tests/client tests/e2e tests/faults tests/services
PROTOS := $(shell find protos -name '*.proto' | LC_ALL=C sort)

.PHONY: demo test test-serving test-computing lint types protos protos-check kernels-compile bench tables gpu setup clean

demo: $(VENV)/.trainer
	$(BIN)/chorus demo

# The halves share nothing: with -j2 they run at a time. What computes yields to what is timed.
test: test-serving test-computing

test-serving: setup
	$(BIN)/python -m pytest $(SERVING)

test-computing: setup
	nice $(BIN)/python -m pytest $(SERVING:%=--ignore=%)

lint: setup
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/lint-imports
	$(BIN)/buf lint

types: setup
	$(BIN)/mypy

# The generators are plugins of protoc, found on PATH.
protos: setup
	PATH="$(CURDIR)/$(BIN):$$PATH" python -m grpc_tools.protoc -Iprotos --python_out=protos --grpc_python_out=protos \
		--mypy_out=quiet:protos --mypy_grpc_out=quiet:protos $(PROTOS)
	$(BIN)/python protos/api_page.py docs/api.md

# The committed stubs, and the page about them, are what the protos generate.
protos-check: protos
	@test -z "$$(git status --porcelain -- protos docs/api.md)" || \
		{ git status --short -- protos docs/api.md; echo "stubs are stale: run make protos and commit"; exit 1; }

# Every Triton kernel for four GPUs, without one: fails on a spill, on too much shared memory, on a dot left to FMA.
# Minutes of two cores, on what others leave of them.
kernels-compile: setup
	nice -n 19 $(BIN)/python -m chorus.kernels.compile_report --json

bench: setup
	$(BIN)/python benchmarks/engine.py --json

# README's tables and the operators' plot, from benchmarks/results/.
tables: setup
	$(BIN)/python benchmarks/tables.py
	$(BIN)/python benchmarks/kernel_plots.py

# Installs nothing: runs with PYTHON as it finds it, on a machine with a CUDA device.
gpu: export PYTHONPATH := protos:kernels:server:trainer
gpu:
	@$(PYTHON) benchmarks/require.py torch transformers peft safetensors pydantic yaml pytest hypothesis psutil
	$(PYTHON) -m pytest -m gpu -p no:asyncio -o asyncio_mode= -o asyncio_default_fixture_loop_scope= -W ignore::pytest.PytestConfigWarning
	$(PYTHON) benchmarks/kernels.py --device cuda --json
	$(PYTHON) benchmarks/pointwise.py --device cuda --json
	$(PYTHON) benchmarks/engine.py --device cuda --json
	$(PYTHON) benchmarks/decode_8b.py --device cuda --json

setup: $(VENV)/.dev

$(VENV)/.dev: pyproject.toml $(VENV)/bin/python
	$(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@ $(VENV)/.trainer

$(VENV)/.trainer: pyproject.toml $(VENV)/bin/python
	$(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet --editable '.[trainer]'
	touch $@

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -prune -exec rm -rf {} +
