# `make mini` and `make test` are all that a fresh machine with Python 3.11+ and a package index needs.

PYTHON ?= python3
# number of test processes; each starts its own servers and Ray clusters
TEST_WORKERS ?= 2
BIN := .venv/bin
STAMP := .venv/.installed
PYTEST := $(BIN)/python -m infra.malloc $(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile

export PYTHON

.DEFAULT_GOAL := help
.PHONY: help setup mini test test-fast test-all lint format lock clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## make or update the environment in .venv

$(STAMP): requirements.lock pyproject.toml infra/setup.sh infra/torchvision_ops.py
	bash infra/setup.sh
	@touch $@

mini: $(STAMP) ## run the whole pipeline on sample data and write its report
	$(BIN)/musevl run --recipe mini

test: lint ## linters, types, import rules and the tests
	@bash infra/install-browser.sh
	$(PYTEST) $(ARGS)

test-fast: $(STAMP) ## the tests that start no process and take seconds, for every save
	$(PYTEST) -m "not processes and not slow" $(ARGS)

test-all: lint ## as `test`, with the full matrices of kills and crashes
	@bash infra/install-browser.sh
	MUSEVL_KILL_POINTS=10 MUSEVL_CRASH_POINTS=all $(PYTEST) --exhaustive $(ARGS)

lint: $(STAMP) ## ruff, mypy and import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP) ## rewrite the sources as ruff wants them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lock: ## resolve requirements.lock again (ARGS=--upgrade for newer versions)
	bash infra/setup.sh lock $(ARGS)

clean: ## remove caches and build outputs; the store (.musevl) and .venv stay
	rm -rf build *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
