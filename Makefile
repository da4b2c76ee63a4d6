# The commands of a contributor; `make` alone lists them. They use .venv where there is one, else the
# active environment, and always import this checkout. ARGS are handed on:
#
#   make test ARGS="tests/noise -x"
#   make bench ARGS="--only ladder.py"

PYTHON ?= $(if $(wildcard .venv/bin/python),.venv/bin/python,python)
PYTEST := $(PYTHON) -m pytest -n 2
ARGS ?=
# Scripts would otherwise import the package that is installed.
export PYTHONPATH := $(CURDIR)

.DEFAULT_GOAL := help
.PHONY: help test test-all slow devices notebooks soak coverage lint format types api bench ci

help: ## this list
	@awk -F ': ## ' '/^[a-z-]+: ## / { printf "%-10s %s\n", $$1, $$2 }' Makefile

test: ## the default tests, as README runs them
	$(PYTEST) $(ARGS)

test-all: ## every test
	$(PYTEST) -m "" $(ARGS)

slow: ## whole training runs, many compilations, statistics over many draws
	$(PYTEST) -m slow $(ARGS)

devices: ## eight devices, and several processes
	$(PYTEST) -m devices $(ARGS)

notebooks: ## every notebook, from a clean kernel
	$(PYTEST) -m notebooks $(ARGS)

soak: ## many thousand steps, or a process that lives long
	$(PYTEST) -m soak $(ARGS)

coverage: ## lines that tests reach, by room: of the default tests, and of all
	rm -rf .coverage && mkdir .coverage
	-$(PYTHON) -m coverage run --data-file=.coverage/default -m pytest -n 2 $(ARGS)
	-$(PYTHON) -m coverage run --data-file=.coverage/rest -m pytest -n 2 -m "slow or devices" $(ARGS)
	$(PYTHON) -m coverage combine --quiet --data-file=.coverage/default
	$(PYTHON) -m coverage combine --quiet --data-file=.coverage/rest
	$(PYTHON) -m tests.line_coverage .coverage/default .coverage/rest

lint: ## style, without changing anything
	$(PYTHON) -m ruff check . $(ARGS)
	$(PYTHON) -m ruff format --check .

format: ## style, and what can be put right is
	$(PYTHON) -m ruff check --fix . $(ARGS)
	$(PYTHON) -m ruff format .

types: ## mypy
	$(PYTHON) -m mypy $(ARGS)

api: ## writes API.md from the docstrings
	$(PYTHON) -m tests.api_index

bench: ## every benchmark, more than an hour
	$(PYTHON) -m tests.benchmarks $(ARGS)

ci: ## everything from nothing, as CI does: new environments, README's commands, the wheel
	bash .ci/run $(ARGS)
