# Everything a newcomer needs: git, make and Python 3.11 or newer. `make demo` and `make test` create .venv themselves.
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Whole files, because tests of one file share trained runs, and in the order of tests/conftest.py: pytest-xdist would
# begin with the files of many tests, and end with the few long ones on one core.
PARALLEL := -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

install: $(STAMP)  ## create .venv and install the tested set

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "fewstep needs Python 3.11 or newer: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	@# torch first and alone, so that no other package chooses its build.
	$(BIN)/pip install --quiet -c constraints.txt torch
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $(STAMP)

demo: $(STAMP)  ## a teacher, three students and their report on shipped data: runs/demo/report/index.html
	$(BIN)/fewstep demo --overwrite

test: $(STAMP)  ## the test suite, a test file at a time on every core
	$(BIN)/python -m pytest $(PARALLEL) -m 'not thorough'

test-fast: $(STAMP)  ## the suite without the tests marked slow
	$(BIN)/python -m pytest $(PARALLEL) -m 'not slow and not thorough'

test-all: $(STAMP)  ## the suite and the tests marked thorough: the same at more points
	$(BIN)/python -m pytest $(PARALLEL)

bench: $(STAMP)  ## the small set of benchmarks beside the peers (five minutes): runs/bench.jsonl and a table
	$(BIN)/python benchmarks/speed.py run --out runs/bench.jsonl

lint: $(STAMP)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)  ## let ruff rewrite
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove .venv and caches (runs stay)
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache build *.egg-info

.PHONY: help install demo test test-fast test-all bench lint format clean
