# Needs Python 3.11+ and make. `make install` is for use and development (.venv, wooly from this tree); `make test` has
# an environment of its own, with the built wheel in it, so that what is tested is what is shipped.

PYTHON ?= python3
VENV := .venv
TEST_VENV := build/venv-test
WHEEL_VENV := build/venv-wheel
INSTALLER := deploy/install.py deploy/vllm_cpu_shim.py
TOOLS := $(TEST_VENV)/bin
SCRIPTS := $(wildcard deploy/*.py benchmarks/*.py)
PYTEST_ARGUMENTS ?=

.DEFAULT_GOAL := help
.PHONY: help install demo test lint wheel bench clean

help: ## this list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 18

install: $(VENV)/.installed ## vLLM and wooly (from this tree) in .venv

$(VENV)/.installed: pyproject.toml $(INSTALLER)
	$(PYTHON) deploy/install.py --venv $(VENV)
	@touch $@

demo: install ## two vLLM servers on one copy of a real model's weights (10 minutes at most)
	@$(VENV)/bin/python benchmarks/demo.py

wheel: ## dist/wooly-VERSION-py3-none-any.whl
	@test -x $(WHEEL_VENV)/bin/python || $(PYTHON) -m venv $(WHEEL_VENV)
	@rm -rf dist
	$(WHEEL_VENV)/bin/python -m pip wheel --quiet --no-deps --wheel-dir dist .

$(TEST_VENV)/.installed: pyproject.toml $(INSTALLER)
	$(PYTHON) deploy/install.py --venv $(TEST_VENV) --without-wooly
	@touch $@

lint: $(TEST_VENV)/.installed ## ruff, mypy, and the layers
	$(TOOLS)/ruff check .
	$(TOOLS)/ruff format --check .
	$(TOOLS)/mypy
	MYPYPATH=benchmarks:deploy $(TOOLS)/mypy $(SCRIPTS)
	$(TOOLS)/lint-imports

# PYTHONSAFEPATH keeps the working directory, and with it the source tree, off the import path: in pytest and in every
# process that a test starts. tests/integration/test_wheel.py checks that it did.
test: lint wheel ## everything that CI runs: lint, build the wheel, install it, and the whole test suite on it
	$(PYTHON) deploy/install.py --venv $(TEST_VENV) --wheel dist/*.whl
	PYTHONSAFEPATH=1 WOOLY_TESTED_WHEEL="$$(ls dist/*.whl)" $(TOOLS)/pytest $(PYTEST_ARGUMENTS)

bench: install ## every benchmark; results go to benchmarks/results
	@set -e; for script in $(sort $(wildcard benchmarks/bench_*.py)); do echo "== $$script"; $(VENV)/bin/python $$script; done

clean: ## remove environments, builds and caches
	rm -rf $(VENV) build dist .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
