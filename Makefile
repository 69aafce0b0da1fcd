# `make demo` and `make test` need Python 3.11 to 3.14 and nothing else: they build their own environment in .venv.
PYTHON   ?= python3
VENV     ?= .venv
PIP_ARGS ?=
DEMO_OUT ?= runs/demo-$(shell date +%Y%m%d-%H%M%S)
TESTS    ?= tests
WORKERS  ?= auto

BIN   := $(VENV)/bin
PIP   := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt $(PIP_ARGS)
NEEDS := pyproject.toml constraints.txt
PYTHONS := 3.11.0 3.12 3.13 3.14

.DEFAULT_GOAL := help
.PHONY: help demo test lint format docs bench torture resolve audit check clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(None if (3, 11) <= sys.version_info < (3, 15) else "etude needs Python 3.11 to 3.14, this is %d.%d: run make PYTHON=python3.11" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.core: $(NEEDS) | $(BIN)/python
	@echo "installing etude into $(VENV) (about a minute)"
	@$(PIP) --editable .
	@touch $@

$(VENV)/.dev: $(NEEDS) | $(BIN)/python
	@echo "installing etude and its development tools into $(VENV) (about a minute)"
	@$(PIP) --editable '.[dev]' --editable examples/plugin
	@touch $@ $(VENV)/.core

$(VENV)/.docs: $(NEEDS) | $(BIN)/python
	@echo "installing etude and the documentation tools into $(VENV) (about a minute)"
	@$(PIP) --editable '.[docs]'
	@touch $@ $(VENV)/.core

demo: $(VENV)/.core  ## fine-tune the embedded model, then show the reward gap (a fresh directory in runs/ each time)
	$(BIN)/etude train emoji-demo --out $(DEMO_OUT)

test: $(VENV)/.dev  ## run every test, on every core (TESTS=tests/sampling for one folder, WORKERS=0 for one process)
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder $(TESTS)

lint: $(VENV)/.dev  ## check style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev  ## mend style and formatting in place
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.docs  ## build the documentation into site/, failing on any warning
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

bench: $(VENV)/.dev  ## run every benchmark (BENCH=overhead for one)
	$(BIN)/python -m benchmarks $(BENCH)

torture: $(VENV)/.dev  ## kill, starve and damage small runs: every resumed one must end with the same bits (minutes)
	$(BIN)/python tests/support/torture.py

resolve: | $(BIN)/python  ## look for a wheel of every pinned package for each supported Python (minutes; nothing is installed)
	@for version in $(PYTHONS); do \
		$(PIP) --dry-run --ignore-installed --only-binary :all: --target build/none --python-version $$version '.[dev,docs]' && \
		echo "Python $$version: every package has a wheel" || exit 1; done

audit: | $(BIN)/python  ## ask PyPI's vulnerability service about every pinned version (AUDIT=--if-reachable passes without it)
	@test -x $(VENV)/audit/bin/pip-audit || { $(BIN)/python -m venv $(VENV)/audit && \
		$(VENV)/audit/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) 'pip-audit>=2.9,<3'; }
	@$(BIN)/python tests/support/audit.py $(VENV)/audit/bin/pip-audit $(AUDIT)

check: AUDIT = --if-reachable
check: lint docs audit test  ## everything that continuous integration runs

clean:  ## remove the environment, caches and the built site (runs/ is kept)
	rm -rf $(VENV) site build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
