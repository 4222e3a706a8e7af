# `make` alone says what there is. Needs Python 3.11 and pip; everything else goes into .venv.

VENV := .venv
BIN := $(VENV)/bin
# The first of these that is Python 3.11; PYTHON=… chooses another.
PYTHON ?= $(shell for name in python3.11 python3 python; do \
	"$$name" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null && { echo "$$name"; break; }; done)
PIP := $(BIN)/python -m pip --disable-pip-version-check
# One thread a process: two that want both cores slow each other down, and only equal counts give equal bits.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo up migrate migration fmt check lint types imports drift deploy-lint test test-stack test-gpu coverage clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# --- environment ------------------------------------------------------------------------------------------------------

setup: $(VENV)/.setup-all ## Everything for work on the code: runtime, tests, linters

$(BIN)/python:
	@if [ -z "$(PYTHON)" ]; then echo "Python 3.11 was not found: install it, or name it with make PYTHON=/path/to/python3.11" >&2; exit 1; fi
	@# Some systems' Python brings venv without ensurepip: their own pip then fills the environment.
	$(PYTHON) -m venv $(VENV) 2>/dev/null || { $(PYTHON) -m venv --clear --without-pip $(VENV) && \
		$(PYTHON) -m pip --python $(BIN)/python install --quiet pip; }

$(VENV)/.setup-runtime: pyproject.toml | $(BIN)/python
	@echo "Installing what the service needs; PyTorch is the large part"
	@$(PIP) install --quiet --editable '.[worker]'
	@touch $@

$(VENV)/.setup-all: pyproject.toml | $(BIN)/python
	@echo "Installing what the service, its tests and the checks need; PyTorch is the large part"
	@$(PIP) install --quiet --editable '.[worker,pretraining,bench,test,dev]'
	@touch $@ $(VENV)/.setup-runtime

clean: ## Remove the environment and every cache; data in .difffit stays
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis .import_linter_cache .coverage htmlcov build *.egg-info

# --- the service ------------------------------------------------------------------------------------------------------

demo: $(VENV)/.setup-runtime ## Two fine-tunings on real images and one mixed batch; writes demo/report.html
	$(BIN)/difffit demo $(DEMO)

up: $(VENV)/.setup-runtime ## The service in the foreground, its data in .difffit
	$(BIN)/difffit up

migrate: $(VENV)/.setup-runtime ## Bring the database that the settings name to the newest schema
	$(BIN)/python -m core.db.migrate

migration: $(VENV)/.setup-all ## Write a new version from what the models say: make migration m="add aliases"
	@if [ -z "$(m)" ]; then echo 'say what changes: make migration m="add aliases"' >&2; exit 1; fi
	@folder=$$(mktemp -d) && trap 'rm -rf "$$folder"' EXIT && export DIFFFIT_DATABASE_URL="sqlite:///$$folder/drift.db" && \
		last=$$(ls migrations/versions | sed -n 's/^\([0-9]\{4\}\)_.*/\1/p' | sort | tail -1) && \
		$(BIN)/alembic upgrade head && \
		$(BIN)/alembic revision --autogenerate --rev-id "$$(printf '%04d' "$$(expr "$$last" + 1)")" -m "$(m)"

# --- the code ---------------------------------------------------------------------------------------------------------

fmt: $(VENV)/.setup-all ## Format, and fix what a machine can fix
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

check: lint types imports drift deploy-lint ## All that needs no test run: format, lint, types, layers, schema drift, containers

lint: $(VENV)/.setup-all
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(VENV)/.setup-all
	$(BIN)/basedpyright

imports: $(VENV)/.setup-all
	$(BIN)/lint-imports

drift: $(VENV)/.setup-all
	@folder=$$(mktemp -d) && trap 'rm -rf "$$folder"' EXIT && export DIFFFIT_DATABASE_URL="sqlite:///$$folder/drift.db" && \
		$(BIN)/python -m core.db.migrate && $(BIN)/alembic check

deploy-lint: $(VENV)/.setup-all
	$(BIN)/docker-compose -f docker-compose.yml config --quiet
	$(BIN)/compose-lint check --quiet --skip-suppressed docker-compose.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.compose-spec docker-compose.yml
	$(BIN)/hadolint Dockerfile

test: $(VENV)/.setup-all ## Every test, on the embedded default and on real PostgreSQL, Valkey and S3
	$(PYTEST) -m "not gpu"

test-stack: $(VENV)/.setup-all ## Only the tests on real PostgreSQL, Valkey and S3
	$(PYTEST) -m "stack and not gpu"

test-gpu: $(VENV)/.setup-all ## Only the tests that need a CUDA device
	$(PYTEST) -m gpu

coverage: $(VENV)/.setup-all ## The tests with branch coverage; htmlcov/index.html
	$(PYTEST) -m "not gpu" --cov --cov-report=term:skip-covered --cov-report=html
