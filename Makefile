# Every target works from a bare checkout and creates .venv if it is missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.installed

# No target sends anything to W&B, even if a key is set.
export WANDB_MODE := offline

.PHONY: help setup demo test test-all check format notebooks clean
.DEFAULT_GOAL := help

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

$(READY): pyproject.toml constraints.txt
	@test -x $(BIN)/uv || { $(PYTHON) -m venv $(VENV) && $(BIN)/python -m pip install --quiet uv; }
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --constraint constraints.txt --editable '.[dev]'
	@touch $@

setup: $(READY) ## create .venv and install vitlit into it, editable

demo: $(READY) ## pretrain and finetune a small ViT on real handwritten digits, in minutes on two CPU cores
	$(BIN)/vitlit fit --config configs/pretrain.yaml
	$(BIN)/vitlit fit --config configs/finetune.yaml

test: $(READY) ## run the test suite
	$(BIN)/python -m pytest -n auto --dist worksteal -m 'not long'

test-all: $(READY) ## run the test suite and the hour-long tests
	$(BIN)/python -m pytest -n auto

check: $(READY) ## check formatting, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(READY) ## format, and fix what lint can fix
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

notebooks: $(READY) ## run the notebooks in place
	$(BIN)/jupyter execute --inplace notebooks/*.ipynb

clean: ## remove .venv, caches and builds (data/ and runs/ stay)
	rm -rf $(VENV) dist build .pytest_cache .mypy_cache .ruff_cache *.egg-info
