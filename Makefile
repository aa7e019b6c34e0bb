# Every target works from a bare checkout and creates .venv if it is missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.installed

# No target sends anything to W&B, even if a key is set.
export WANDB_MODE := offline

.PHONY: help setup demo test test-all check format docs notebooks clean
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

docs: $(READY) ## build the site into site/; a warning, such as a dead link, is an error
	$(BIN)/python -m sphinx -W --keep-going -b html docs site

notebooks: $(READY) ## run the notebooks in place
	$(BIN)/jupyter execute --inplace notebooks/*.ipynb

clean: ## remove .venv, caches and builds (data/ and runs/ stay)
	rm -rf $(VENV) dist build site .pytest_cache .mypy_cache .ruff_cache *.egg-info
