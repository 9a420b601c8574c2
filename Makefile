# `make serve` and `make test` do all their own set-up, on a machine that has nothing of ours installed.

PYTHON ?= python3
VENV   ?= .venv
PORT   ?= 8000
# More flags for `steer-server serve`, its own or vLLM's: make serve ARGS="--steering-layers 10-20"
ARGS   ?=

BIN    := $(VENV)/bin
INPUTS := pyproject.toml scripts/install_engine.py

.PHONY: serve test lint unit bench conformance ray kernels clean help

help: ## Show this text
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 13

serve: $(VENV)/.installed ## Serve the embedded model on port 8000 (PORT=..., ARGS="...")
	$(BIN)/steer-server serve --port $(PORT) $(ARGS)

test: lint $(VENV)/.dev-installed ## Run the whole test suite
	$(BIN)/python -m pytest

unit: $(VENV)/.dev-installed ## Run the tests that start no engine
	$(BIN)/python -m pytest -m "not engine and not compiles and not interprets"

lint: $(VENV)/.dev-installed ## Run ruff, mypy and hadolint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/hadolint Dockerfile Dockerfile.cpu

bench: $(VENV)/.dev-installed ## Measure the serving overhead against vanilla vLLM
	$(BIN)/python benchmarks/serving_overhead.py

conformance: ## Write the SAE fixtures anew with the libraries they come from, and compare
	$(PYTHON) -m tests.conformance

ray: $(VENV)/.dev-installed ## Install Ray and run the tests on a cluster of two workers
	$(BIN)/python -m pip install --quiet 'ray[data]>=2.60'
	$(BIN)/python -m pytest tests/e2e/test_batch_ray.py

kernels: $(VENV)/.dev-installed ## Of the tests, those that interpret the Triton kernels and compile them for other GPUs
	$(BIN)/python -m pytest -m "compiles or interprets" tests/kernels

clean: ## Remove the virtual environments and caches
	rm -rf $(VENV) .conformance .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(INPUTS) | $(BIN)/python
	$(BIN)/python scripts/install_engine.py
	touch $@

$(VENV)/.dev-installed: $(INPUTS) | $(BIN)/python
	$(BIN)/python scripts/install_engine.py dev
	touch $@ $(VENV)/.installed
