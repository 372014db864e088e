# `make demo` and `make test` need nothing but Python 3.11 or 3.12 on the path; each makes its own environment.
PYTHON ?= $(shell command -v python3.12 >/dev/null 2>&1 && python3.12 -c '' >/dev/null 2>&1 && echo python3.12 || command -v python3.11 || echo python3)
VENV ?= .venv
BIN := $(VENV)/bin
CODE := src tests bench docs

.DEFAULT_GOAL := help
.PHONY: help demo test test-fast faults fuzz check check-js format docs bench-env clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

demo: $(VENV)/.installed  ## train, transfer and evaluate on the built-in model (minutes, offline)
	$(BIN)/saerelay demo

test: $(VENV)/.dev  ## every test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto src tests

test-fast: $(VENV)/.dev  ## the tests of a minute: what to run after each change
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto src tests -m "not slow and not browser and not claims and not interpreter"

faults: $(VENV)/.dev  ## kill every command at every call, fail every call, look for a way on (an hour or two; MINUTES=10 for less)
	$(BIN)/python -W ignore tests/faults/run.py --jobs 2 --minutes $(or $(MINUTES),0)

fuzz: $(VENV)/.dev  ## give commands thousands of damaged and hostile files (N=20000 for more)
	$(BIN)/python -W ignore tests/faults/fuzz.py --n $(or $(N),5000)

check: $(VENV)/.dev  ## formatting, lint, types, import order; a pre-commit hook runs the same
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/ruff check $(CODE)
	$(BIN)/pyright --pythonpath $(BIN)/python src
	$(BIN)/python -m pytest tests/test_layering.py

check-js:  ## layout, lint and types of the report's JavaScript; skipped without Node.js 20.19 or newer
	@if node -e 'process.exit(parseInt(process.versions.node) < 20 ? 1 : 0)' 2>/dev/null && command -v npm >/dev/null; then \
	  $(MAKE) -s node_modules/.installed && npm run --silent check; \
	else \
	  echo "check-js: skipped; it needs npm and Node.js 20.19 or newer" >&2; \
	fi

format: $(VENV)/.dev  ## format, and mend what lint can mend
	$(BIN)/ruff format $(CODE)
	$(BIN)/ruff check --fix $(CODE)

docs: $(VENV)/.docs  ## the documentation, in site/; opens from disk
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

bench-env: .peers/.installed  ## this package and the tools that bench/step.py compares with, in .peers

clean:  ## remove the environments and everything built
	rm -rf $(VENV) .peers node_modules site runs/demo .pytest_cache .ruff_cache

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# torch first, pinned: an unpinned one may bring gigabytes of GPU libraries that a laptop has no use for.
$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(VENV)/.dev: $(VENV)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,tensorboard]'
	touch $@

$(VENV)/.docs: $(VENV)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	touch $@

node_modules/.installed: package.json package-lock.json
	npm ci --silent --ignore-scripts --no-audit --no-fund
	touch $@

.peers/.installed: pyproject.toml bench/peers.txt
	$(PYTHON) -m venv .peers
	.peers/bin/pip install --quiet --disable-pip-version-check torch==2.13.0
	.peers/bin/pip install --quiet --disable-pip-version-check -e . -r bench/peers.txt
	.peers/bin/pip install --quiet --disable-pip-version-check --no-deps dictionary-learning==0.1.0
	touch $@
