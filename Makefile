# Every target works from a bare checkout: .venv is made when it is missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.installed

# Nothing here may go online for W&B, even where a key is set.
export WANDB_MODE := offline

.PHONY: help setup demo test test-all check format notebooks clean
.DEFAULT_GOAL := help

help: ## print this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

$(READY): pyproject.toml constraints.txt
	@test -x $(BIN)/uv || { $(PYTHON) -m venv $(VENV) && $(BIN)/python -m pip install --quiet uv; }
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --constraint constraints.txt --editable '.[dev]'
	@touch $@

setup: $(READY) ## make .venv and install vitlit into it, editable

demo: $(READY) ## pretrain and finetune a small ViT on real handwritten digits, in minutes on two CPU cores
	$(BIN)/vitlit fit --config configs/pretrain.yaml
	$(BIN)/vitlit fit --config configs/finetune.yaml

test: $(READY) ## the test suite
	$(BIN)/python -m pytest -n auto -m 'not long'

test-all: $(READY) ## the test suite and the hour-long tests
	$(BIN)/python -m pytest -n auto

check: $(READY) ## formatting, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(READY) ## format and mend what lint can mend
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

notebooks: $(READY) ## execute the notebooks in place
	$(BIN)/jupyter execute --inplace notebooks/*.ipynb

clean: ## remove .venv, caches and builds (data/ and runs/ stay)
	rm -rf $(VENV) dist build .pytest_cache .mypy_cache .ruff_cache *.egg-info
